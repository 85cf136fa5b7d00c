"""Solids found indoors: simple bodies, dishes, furniture, tools and toys. Every builder is a few primitives.

A builder draws proportions and returns (field, colour) parts anywhere within +-2.4; `place` does the rest.
"""

import numpy as np

from backbones.tiny.recipes.shapes.part import Draw, Part
from backbones.tiny.recipes.shapes.sdf import (
    around,
    blend,
    box,
    capsule,
    common,
    corners,
    cut,
    cylinder,
    ellipsoid,
    extrude,
    frustum,
    move,
    pair,
    regular,
    revolve,
    sphere,
    torus,
    turn,
    union,
)  # fmt: skip


def ball(d: Draw) -> list[Part]:
    """A sphere, sometimes with a band."""
    parts = [(sphere(1.0), d.colour())]
    if d.flip(0.3):
        parts.append((common(sphere(1.01), box(2, d(0.1, 0.3), 2)), d.colour()))
    return parts


def block(d: Draw) -> list[Part]:
    """A box of any proportions."""
    sides = [d(0.35, 1.0) for _ in range(3)]
    return [(box(*sides, rounding=d(0.01, 0.12)), d.colour())]


def drum(d: Draw) -> list[Part]:
    """A cylinder with coloured rims."""
    radius, half = d(0.4, 1.0), d(0.3, 1.0)
    rim = d(0.05, 0.12)
    rims = union(move(cylinder(radius * 1.03, rim), y=half), move(cylinder(radius * 1.03, rim), y=-half))
    return [(cylinder(radius, half), d.colour()), (rims, d.colour())]


def cone(d: Draw) -> list[Part]:
    """A cone, sharp or cut off, sometimes on a square foot."""
    half, low = d(0.6, 1.0), d(0.45, 0.9)
    parts = [(frustum(low, d(0.0, 0.25), half), d.near(0.07, 0.9, 0.95))]
    if d.flip():
        parts.append((move(box(low * 1.3, 0.07, low * 1.3, 0.02), y=-half), d.colour()))
    return parts


def ring(d: Draw) -> list[Part]:
    """A torus, lying or upright."""
    field = torus(0.75, d(0.15, 0.38))
    return [(turn(field, "x", d(0, 35) if d.flip() else d(60, 90)), d.colour())]


def pill(d: Draw) -> list[Part]:
    """A capsule in two colours, tilted."""
    half, radius, tilt = d(0.4, 1.0), d(0.25, 0.5), d(-60, 60)
    whole = capsule((0, -half, 0), (0, half, 0), radius)
    top = common(whole, move(box(2, 2, 2), y=2))
    return [(turn(whole, "z", tilt), d.colour()), (turn(top, "z", tilt), d.colour())]


def egg(d: Draw) -> list[Part]:
    """An ellipsoid."""
    return [(ellipsoid(d(0.5, 0.8), 1.0, d(0.5, 0.8)), d.colour())]


def prism(d: Draw) -> list[Part]:
    """An upright or lying prism with 3 to 8 sides."""
    field = extrude(regular(d.count(3, 8), 0.8), d(0.3, 1.0), 0.02)
    return [(turn(field, "x", 90 if d.flip(0.6) else 0), d.colour())]


def gem(d: Draw) -> list[Part]:
    """Two pyramids base to base."""
    sides, middle = d.count(4, 8), d(-0.1, 0.4)
    slope = revolve([(0, -1.0), (0.75, middle), (d(0.3, 0.6), 0.7), (0, 0.7)])
    walls = turn(extrude(regular(sides, 0.78), 1.5), "x", 90)
    return [(common(slope, walls), d.near(0.52, 0.6, 0.9))]


def mug(d: Draw) -> list[Part]:
    """A cup with a handle."""
    radius, half, wall = d(0.55, 0.75), d(0.55, 0.85), d(0.07, 0.12)
    hollow = move(cylinder(radius - wall, half), y=2 * wall)
    handle = turn(torus(half * d(0.4, 0.6), d(0.07, 0.12)), "x", 90)
    side = 1 if d.flip() else -1
    grip = cut(move(handle, x=side * radius), cylinder(radius - 0.5 * wall, 2))
    return [(cut(cylinder(radius, half, 0.03), hollow), (colour := d.colour())), (grip, colour)]


def bowl(d: Draw) -> list[Part]:
    """A half shell on a foot, sometimes full."""
    wall, flat = d(0.07, 0.13), d(0.75, 1.0)
    shell = cut(ellipsoid(1, flat, 1), ellipsoid(1 - wall, flat - wall, 1 - wall), move(box(2, 1, 2), y=1))
    foot = move(cylinder(d(0.35, 0.5), 0.08), y=-flat)
    parts = [(union(shell, foot), d.colour())]
    if d.flip(0.4):
        parts.append((move(ellipsoid(0.9, d(0.12, 0.45), 0.9), y=-0.15), d.colour()))
    return parts


def bottle(d: Draw) -> list[Part]:
    """A bottle with a label and a cap."""
    body, neck, shoulder = d(0.3, 0.45), d(0.1, 0.18), d(0.1, 0.5)
    profile = [(0, -1), (body, -1), (body, shoulder - 0.25), (neck, shoulder + 0.1), (neck, 1.0), (0, 1.0)]
    label = move(cylinder(body + 0.02, d(0.15, 0.3)), y=-0.45)
    cap = move(cylinder(neck + 0.05, 0.1), y=1.0)
    return [(revolve(profile, 0.02), d.colour()), (label, d.colour()), (cap, d.colour())]


def vase(d: Draw) -> list[Part]:
    """A curved vase, open at the top."""
    heights = np.linspace(-1, 1, 7)
    phase, belly = d(0, 2), d(0.15, 0.3)
    radii = 0.45 + belly * np.sin(phase + 2.2 * (heights + 1))
    outer = [(0, -1.0), *zip(radii, heights, strict=True), (0, 1.0)]
    inner = [(0, -0.85), *zip(radii - 0.09, heights + 0.1, strict=True), (0, 1.2)]
    return [(cut(revolve(outer), revolve(inner)), d.colour())]


def goblet(d: Draw) -> list[Part]:
    """A trophy or a glass: foot, stem, cup, sometimes two handles."""
    cup, stem = d(0.45, 0.65), d(0.07, 0.12)
    gold = d.near(0.13, 0.75, 0.95)
    outside = [
        (0, -1),
        (d(0.35, 0.5), -1),
        (0.35, -0.85),
        (stem, -0.7),
        (stem, -0.25),
        (cup * 0.8, 0.1),
        (cup, 1),
        (0, 1),
    ]
    inside = [(0, 0.0), (cup * 0.65, 0.2), (cup * 0.85, 1.2), (0, 1.2)]
    parts = [(cut(revolve(outside), revolve(inside)), gold)]
    if d.flip():
        handle = cut(pair(turn(torus(0.3, 0.06), "x", 90), cup), cylinder(cup * 0.85, 2))
        parts.append((move(handle, y=0.55), gold))
    return parts


def chair(d: Draw) -> list[Part]:
    """A seat, four legs, a back."""
    half, leg, back = d(0.45, 0.6), d(0.05, 0.09), d(0.6, 1.0)
    wood = d.wood()
    legs = move(corners(box(leg, 0.45, leg), half - leg, half - leg), y=-0.5)
    parts = [(union(box(half, 0.07, half, 0.02), legs), wood)]
    rest = box(half, back / 2, 0.06, 0.02)
    if d.flip(0.4):
        rest = cut(rest, box(half - 0.12, back / 2 - 0.15, 1))
    parts.append((move(rest, y=back / 2, z=-half + 0.06), wood if d.flip() else d.colour()))
    return parts


def stool(d: Draw) -> list[Part]:
    """A round seat on three or four slanted legs."""
    seat, spread = d(0.45, 0.65), d(0.4, 0.7)
    legs = around(capsule((0, -0.9, spread), (0, 0, seat * 0.6), d(0.05, 0.09)), d.count(3, 4))
    return [(cylinder(seat, d(0.07, 0.14), 0.03), d.colour()), (legs, d.wood())]


def table(d: Draw) -> list[Part]:
    """A rectangular table."""
    x, z, tall, leg = d(0.7, 1.0), d(0.45, 0.8), d(0.35, 0.6), d(0.05, 0.09)
    legs = corners(box(leg, tall, leg), x - 1.5 * leg, z - 1.5 * leg)
    top = move(box(x, d(0.05, 0.09), z, 0.02), y=tall)
    wood = d.wood()
    return [(legs, wood), (top, wood if d.flip() else d.colour())]


def round_table(d: Draw) -> list[Part]:
    """A round top on a column and a foot."""
    tall = d(0.4, 0.75)
    column = union(cylinder(d(0.07, 0.13), tall), move(cylinder(d(0.3, 0.5), 0.05), y=-tall))
    return [(column, d.steel()), (move(cylinder(d(0.7, 1.0), 0.06), y=tall), d.wood())]


def sofa(d: Draw) -> list[Part]:
    """A seat between two arms and a back."""
    half, arm = d(0.8, 1.0), d(0.12, 0.2)
    colour = d.colour()
    seat = move(box(half, 0.18, 0.42, 0.05), y=-0.2)
    back = move(box(half, d(0.35, 0.5), 0.14, 0.05), y=0.1, z=-0.4)
    arms = move(pair(box(arm, 0.33, 0.45, 0.06), half - arm), y=-0.08)
    feet = move(corners(cylinder(0.05, 0.08), half - 0.1, 0.3), y=-0.43)
    return [(union(seat, back, arms), colour), (feet, d.wood())]


def bed(d: Draw) -> list[Part]:
    """A mattress, a pillow and a headboard."""
    x, z = d(0.5, 0.75), d(0.9, 1.1)
    head = move(box(x, d(0.35, 0.5), 0.06), y=0.1, z=-z)
    feet = move(corners(box(0.05, 0.1, 0.05), x - 0.06, z - 0.06), y=-0.38)
    mattress = move(box(x, 0.13, z, 0.05), y=-0.1)
    pillow = move(ellipsoid(x * 0.7, 0.12, 0.2), y=0.07, z=-z + 0.28)
    frame = move(box(x, 0.06, z), y=-0.27)
    return [(union(head, feet, frame), d.wood()), (mattress, d.colour()), (pillow, (0.95, 0.95, 0.95))]


def lamp(d: Draw) -> list[Part]:
    """A table lamp."""
    stem = union(cylinder(0.05, 0.7), move(cylinder(d(0.25, 0.4), 0.07), y=-0.7))
    shade = move(frustum(d(0.45, 0.65), d(0.2, 0.4), d(0.25, 0.4)), y=0.6)
    return [(stem, d.steel()), (shade, d.near(0.13, 0.5, 0.95))]


def shelf(d: Draw) -> list[Part]:
    """A bookcase with two to four boards and some books."""
    x, z, boards = d(0.45, 0.7), d(0.2, 0.3), d.count(2, 4)
    gap = 1.84 / boards
    holes = [move(box(x - 0.07, gap / 2 - 0.05, z), y=-0.92 + gap * (i + 0.5), z=0.07) for i in range(boards)]
    parts = [(cut(box(x, 1, z), *holes), d.wood())]
    for i in range(boards):
        wide = d(0.15, x - 0.15)
        height = gap * d(0.25, 0.38)
        side = (x - 0.08 - wide) * (1 if d.flip() else -1)
        parts.append((move(box(wide, height, z - 0.08), x=side, y=-0.87 + gap * i + height), d.colour()))
    return parts


def book(d: Draw) -> list[Part]:
    """A closed book, standing or lying."""
    x, thick, angle = d(0.6, 0.75), d(0.1, 0.25), 90 if d.flip() else 0
    cover = union(pair(box(0.03, 0.95, x), thick), move(box(thick, 0.95, 0.03), z=-x))
    pages = box(thick, 0.9, x - 0.05)
    lie = [
        (turn(field, "z", angle), colour)
        for field, colour in ((cover, d.colour()), (pages, (0.95, 0.94, 0.9)))
    ]
    return [(turn(field, "y", d(-20, 20) + 40), colour) for field, colour in lie]


def bucket(d: Draw) -> list[Part]:
    """An open bucket with a handle."""
    low, high = d(0.4, 0.55), d(0.6, 0.75)
    tub = cut(frustum(low, high, 0.65), move(frustum(low - 0.08, high - 0.08, 0.65), y=0.1))
    arc = cut(turn(torus(high, 0.045), "x", 90), move(box(2, 1, 2), y=-1))
    return [(tub, d.colour()), (move(arc, y=0.6), d.steel())]


def barrel(d: Draw) -> list[Part]:
    """A bulging barrel with two hoops."""
    heights = np.linspace(-0.9, 0.9, 7)
    belly = d(0.12, 0.25)
    radii = 0.62 + belly * (1 - (heights / 0.9) ** 2)
    body = revolve([(0, -0.9), *zip(radii, heights, strict=True), (0, 0.9)])
    hoop = cylinder(0.66 + belly * 0.72, 0.07)
    return [(body, d.wood()), (union(move(hoop, y=0.45), move(hoop, y=-0.45)), d.steel())]


def candle(d: Draw) -> list[Part]:
    """A candle on a plate, with a flame."""
    radius, half = d(0.18, 0.35), d(0.4, 0.7)
    plate = move(cylinder(radius * d(1.5, 2.2), 0.06), y=-half)
    flame = move(ellipsoid(0.1, 0.2, 0.1), y=half + 0.22)
    return [(cylinder(radius, half), d.colour()), (plate, d.steel()), (flame, (1.0, 0.7, 0.15))]


def cake(d: Draw) -> list[Part]:
    """Two or three tiers and a cherry."""
    tiers, radius, base = d.count(1, 3), 0.9, -0.6
    parts = []
    for _ in range(tiers):
        half = d(0.18, 0.3)
        parts.append((move(cylinder(radius, half, 0.04), y=base + half), d.colour()))
        base, radius = base + 2 * half, radius * d(0.6, 0.75)
    return [*parts, (move(sphere(0.13), y=base + 0.08), (0.85, 0.1, 0.15))]


def ice_cream(d: Draw) -> list[Part]:
    """A cone with one to three scoops."""
    parts = [(move(frustum(0.03, 0.4, 0.6), y=-0.6), d.near(0.09, 0.55, 0.85))]
    height, radius = 0.15, d(0.4, 0.5)
    for _ in range(d.count(1, 3)):
        parts.append((move(sphere(radius), y=height), d.near(0.95, 0.35, 0.95)))
        height, radius = height + radius * 1.1, radius * 0.85
    return parts


def key(d: Draw) -> list[Part]:
    """A key: a ring, a shaft, a bit."""
    bow, shaft = d(0.28, 0.4), d(0.06, 0.1)
    ring_ = move(turn(torus(bow, d(0.08, 0.13)), "x", 90), y=0.6)
    teeth = [move(box(d(0.12, 0.22), 0.06, 0.05), x=0.15, y=-0.9 + 0.22 * i) for i in range(d.count(2, 3))]
    rod = capsule((0, 0.6 - bow, 0), (0, -1, 0), shaft)
    tilt = d(-50, 50)
    return [(turn(union(ring_, rod, *teeth), "z", tilt), d.near(0.13, 0.7, 0.9))]


def hammer(d: Draw) -> list[Part]:
    """A hammer."""
    handle = capsule((0, -1, 0), (0, 0.6, 0), d(0.07, 0.12))
    head = union(box(d(0.35, 0.5), 0.16, 0.16, 0.03), move(turn(cylinder(0.2, 0.12), "z", 90), x=0.42))
    tilt = d(-45, 45)
    return [(turn(handle, "z", tilt), d.wood()), (turn(move(head, y=0.65), "z", tilt), d.steel())]


def dumbbell(d: Draw) -> list[Part]:
    """Two weights on a bar."""
    weight = turn(cylinder(d(0.3, 0.5), d(0.12, 0.25), 0.03), "z", 90)
    bar = capsule((-0.8, 0, 0), (0.8, 0, 0), d(0.06, 0.1))
    return [(pair(weight, 0.7), d.colour()), (bar, d.steel())]


def dice(d: Draw) -> list[Part]:
    """A rounded cube with dimples."""
    half = 0.7
    pips = [sphere(0.15)] if d.flip() else [pair(sphere(0.13), 0.3)]
    dimples = [
        move(pips[0], z=half),
        turn(move(pips[0], z=half), "y", 90),
        turn(move(pips[0], z=half), "x", -90),
    ]
    body = box(half, half, half, d(0.06, 0.15))
    inside = [common(tool, sphere(2)) for tool in dimples]
    dark = common(box(half * 0.97, half * 0.97, half * 0.97), union(*inside))
    return [
        (cut(body, *(move(tool) for tool in inside)), d.colour()),
        (common(dark, sphere(0.75)), (0.1, 0.1, 0.1)),
    ]


def pawn(d: Draw) -> list[Part]:
    """A chess pawn."""
    waist = d(0.14, 0.24)
    body = revolve([(0, -1), (d(0.5, 0.62), -1), (0.5, -0.8), (waist + 0.1, -0.6), (waist, 0.2), (0, 0.2)])
    collar = move(cylinder(0.34, 0.06), y=0.25)
    return [(union(body, collar, move(sphere(d(0.32, 0.42)), y=0.6)), d.colour())]


def bell(d: Draw) -> list[Part]:
    """A hand bell."""
    body = revolve([(0, -0.6), (d(0.7, 0.85), -0.7), (0.5, -0.3), (0.4, 0.3), (0.25, 0.55), (0, 0.6)])
    top = move(turn(torus(0.16, 0.06), "x", 90), y=0.72)
    return [(union(body, top), d.near(0.13, 0.75, 0.9)), (move(sphere(0.18), y=-0.75), d.steel())]


def hat(d: Draw) -> list[Part]:
    """A top hat or a straw hat with a band."""
    brim, crown, half = d(0.8, 1.0), d(0.4, 0.55), d(0.2, 0.5)
    top = move(frustum(crown, crown * d(0.8, 1.1), half), y=half)
    band = move(cylinder(crown + 0.03, 0.08), y=0.1)
    return [(union(cylinder(brim, 0.06, 0.02), top), d.colour()), (band, d.colour())]


def robot(d: Draw) -> list[Part]:
    """A toy robot of boxes."""
    body, head = d(0.35, 0.5), d(0.25, 0.38)
    colour = d.colour()
    arms = move(pair(box(0.09, d(0.28, 0.4), 0.1, 0.03), body + 0.12), y=-0.05)
    legs = move(pair(box(0.13, 0.25, 0.14, 0.03), 0.2), y=-0.65)
    antenna = union(move(cylinder(0.03, 0.12), y=0.55 + head), move(sphere(0.07), y=0.68 + head))
    eyes = move(pair(sphere(0.08), head * 0.45), y=0.45 + head / 2, z=head * 0.8)
    parts = [
        (box(body, 0.42, 0.28, 0.04), colour),
        (move(box(head, head * 0.7, head * 0.8, 0.05), y=0.68), colour),
    ]
    return [*parts, (union(arms, legs, antenna), d.steel()), (eyes, (0.1, 0.1, 0.1))]


def person(d: Draw) -> list[Part]:
    """A simple figure with arms and legs."""
    lift, stride = d(-0.5, 0.6), d(0.12, 0.3)
    torso = blend(
        0.1,
        capsule((0, -0.1, 0), (0, 0.35, 0), d(0.2, 0.28)),
        pair(capsule((0, 0.35, 0), (0.4, 0.2 + lift * 0.6, 0), 0.1), 0.15),
    )
    legs = pair(capsule((0, -0.2, 0), (0.1, -0.95, 0), 0.12), stride * 0.6)
    skin = d.near(0.07, 0.45, 0.9)
    return [(torso, d.colour()), (legs, d.colour()), (move(sphere(d(0.22, 0.3)), y=0.8), skin)]


def spinning_top(d: Draw) -> list[Part]:
    """A spinning top."""
    body = revolve([(0, -0.9), (d(0.6, 0.85), d(-0.2, 0.1)), (0.3, 0.35), (0.09, 0.4), (0.09, 0.9), (0, 0.9)])
    return [(turn(body, "z", d(-15, 15)), d.colour())]


def gear(d: Draw) -> list[Part]:
    """A cog wheel, upright or lying."""
    count, half = d.count(6, 10), d(0.12, 0.25)
    wheel = union(cylinder(0.7, half), around(move(box(0.13, half, 0.2), z=0.75), count))
    wheel = cut(wheel, cylinder(d(0.2, 0.35), 1))
    return [(turn(wheel, "x", 90 if d.flip(0.6) else 0), d.steel())]


def star(d: Draw) -> list[Part]:
    """A thick five- or six-pointed star."""
    field = extrude(regular(d.count(5, 6), 1.0, d(0.4, 0.6)), d(0.12, 0.3), 0.03)
    return [(field, d.near(0.14, 0.8, 0.98))]


def arrow(d: Draw) -> list[Part]:
    """A thick arrow."""
    wide, shaft = d(0.5, 0.75), d(0.15, 0.3)
    shape = [(0, 1), (wide, 0.2), (shaft, 0.2), (shaft, -1), (-shaft, -1), (-shaft, 0.2), (-wide, 0.2)]
    return [(turn(extrude(shape[::-1], d(0.12, 0.3)), "z", 45 * d.count(0, 7)), d.colour())]


HOME = {
    builder.__name__: builder
    for builder in (
        ball, block, drum, cone, ring, pill, egg, prism, gem, mug, bowl, bottle, vase, goblet, chair, stool,
        table, round_table, sofa, bed, lamp, shelf, book, bucket, barrel, candle, cake, ice_cream, key,
        hammer, dumbbell, dice, pawn, bell, hat, robot, person, spinning_top, gear, star, arrow,
    )
}  # fmt: skip
