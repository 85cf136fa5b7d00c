"""Solids of thin rods, rings and plates: what a small model loses first. Every builder is a few primitives.

A builder draws proportions and returns (field, colour) parts anywhere within +-2.4; `place` does the rest.
"""

import numpy as np

from backbones.tiny.recipes.shapes.part import Draw, Part
from backbones.tiny.recipes.shapes.sdf import (
    around,
    box,
    capsule,
    common,
    corners,
    cut,
    cylinder,
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
)


def upright_ring(radius: float, tube: float):
    """A torus that faces the viewer."""
    return turn(torus(radius, tube), "x", 90)


def thin_ring(d: Draw) -> list[Part]:
    """A finger ring with a stone, or a bare hoop."""
    tube = d(0.06, 0.14)
    parts = [(upright_ring(0.75, tube), d.near(0.13, 0.7, 0.9))]
    if d.flip(0.6):
        stone = extrude(regular(d.count(4, 8), d(0.18, 0.3)), d(0.12, 0.2))
        parts.append((move(stone, y=0.75 + tube + 0.1), d.colour()))
    return parts


def door_key(d: Draw) -> list[Part]:
    """A key: ring, shaft, two or three teeth."""
    bow, shaft, tube = d(0.25, 0.4), d(0.06, 0.1), d(0.07, 0.12)
    teeth = [
        move(box(d(0.1, 0.2), 0.06, shaft), x=0.12, y=-1.0 + 0.22 * number) for number in range(d.count(2, 3))
    ]
    rod = capsule((0, 0.5 - bow, 0), (0, -1.05, 0), shaft)
    whole = union(move(upright_ring(bow, tube), y=0.5), rod, *teeth)
    return [(turn(whole, "z", d(-70, 70)), d.near(0.13, 0.6, 0.85))]


def thin_chair(d: Draw) -> list[Part]:
    """A chair of thin legs with bars or a frame for a back."""
    wide, thick, leg, back = d(0.4, 0.55), d(0.04, 0.07), d(0.035, 0.065), d(0.7, 1.0)
    colour = d.wood() if d.flip(0.6) else d.colour()
    legs = move(corners(cylinder(leg, 0.4), wide - leg, wide - leg), y=-0.45)
    seat = box(wide, thick, wide, 0.02)
    posts = move(pair(cylinder(leg, back / 2), wide - leg), y=back / 2, z=-wide + leg)
    bars = [
        move(box(wide, leg, leg), y=back * share, z=-wide + leg)
        for share in np.linspace(0.45, 1, d.count(2, 4))
    ]
    return [(union(legs, posts, *bars), colour), (seat, d.colour() if d.flip(0.4) else colour)]


def thin_stool(d: Draw) -> list[Part]:
    """A round seat on three or four slanted rods with a ring between them."""
    count, rod, out = d.count(3, 4), d(0.04, 0.07), d(0.1, 0.3)
    legs = around(capsule((0, 0.55, 0.35), (0, -0.8, 0.35 + out), rod), count)
    brace = move(torus(0.35 + out * 0.7, rod * 0.8), y=-0.4)
    return [(union(legs, brace), d.wood()), (move(cylinder(0.5, 0.06, 0.02), y=0.6), d.colour())]


def floor_lamp(d: Draw) -> list[Part]:
    """A shade on a thin pole with a flat foot."""
    pole, shade = d(0.03, 0.06), d(0.28, 0.45)
    parts = union(cylinder(pole, 1.0), move(cylinder(d(0.3, 0.45), 0.04), y=-1.0))
    top = cut(
        frustum(shade, shade * d(0.5, 0.9), 0.25), move(frustum(shade - 0.06, shade * 0.4, 0.25), y=-0.05)
    )
    return [(parts, d.steel()), (move(top, y=0.95), d.near(0.14, 0.5, 0.95))]


def spectacles(d: Draw) -> list[Part]:
    """Two rings, a bridge and two temples."""
    radius, tube = d(0.3, 0.42), d(0.04, 0.08)
    gap = radius + d(0.08, 0.16)
    rims = pair(upright_ring(radius, tube), gap)
    bridge = capsule((-gap + radius, 0.08, 0), (gap - radius, 0.08, 0), tube)
    temples = pair(capsule((0, 0.08, 0), (0, d(0, 0.08), -1.1), tube), gap + radius)
    return [(union(rims, bridge, temples), d.colour())]


def thin_mug(d: Draw) -> list[Part]:
    """A mug or a pot with a thin handle, and sometimes one on either side."""
    radius, half, wall = d(0.45, 0.7), d(0.45, 0.8), d(0.05, 0.09)
    hollow = move(cylinder(radius - wall, half), y=2 * wall)
    handle = upright_ring(half * d(0.4, 0.6), d(0.045, 0.075))
    side = radius if d.flip() else -radius
    grips = pair(handle, radius) if d.flip(0.25) else move(handle, x=side)
    grips = cut(grips, cylinder(radius - 0.5 * wall, 2))
    colour = d.colour()
    return [(cut(cylinder(radius, half, 0.02), hollow), colour), (grips, colour)]


def basket(d: Draw) -> list[Part]:
    """An open basket with a high bow."""
    low, high, half = d(0.45, 0.6), d(0.65, 0.8), d(0.3, 0.45)
    body = cut(frustum(low, high, half), move(frustum(low - 0.07, high - 0.07, half), y=0.1))
    bow = common(move(upright_ring(high - 0.05, d(0.04, 0.07)), y=half), move(box(2, 1, 2), y=half + 1))
    return [(body, d.wood()), (bow, d.wood())]


def spoked_wheel(d: Draw) -> list[Part]:
    """A wheel of a cart or a bicycle."""
    tube, count = d(0.05, 0.12), d.count(5, 10)
    spokes = around(capsule((0, 0, 0), (0, 0, 0.85), d(0.025, 0.05)), count)
    wheel = union(torus(0.85, tube), spokes, cylinder(0.13, tube + 0.04))
    return [(turn(wheel, "x", 90 if d.flip(0.8) else 0), d.colour())]


def bicycle(d: Draw) -> list[Part]:
    """Two wheels, a frame of rods, handlebar and saddle."""
    radius, tube, rod = d(0.36, 0.46), d(0.035, 0.06), d(0.03, 0.05)
    wheels = move(pair(upright_ring(radius, tube), 0.65), y=-0.35)
    hub, head, seat, pedal = (-0.65, -0.35, 0), (0.5, 0.3, 0), (-0.25, 0.3, 0), (-0.1, -0.35, 0)
    frame = [
        capsule(*ends, rod)
        for ends in (
            (hub, seat),
            (seat, head),
            (pedal, head),
            (hub, pedal),
            (pedal, seat),
            ((0.65, -0.35, 0), head),
        )
    ]
    bar = union(capsule(head, (0.45, 0.5, 0), rod), capsule((0.45, 0.5, -0.25), (0.45, 0.5, 0.25), rod))
    saddle = move(box(0.2, 0.05, 0.09, 0.03), x=-0.28, y=0.42)
    post = capsule(seat, (-0.28, 0.42, 0), rod)
    return [(union(*frame, bar, post), d.colour()), (union(wheels, saddle), (0.15, 0.15, 0.17))]


def ladder(d: Draw) -> list[Part]:
    """Two rails and rungs, leaning."""
    wide, rail, count = d(0.25, 0.4), d(0.04, 0.065), d.count(4, 7)
    rungs = [capsule((-wide, y, 0), (wide, y, 0), rail * 0.8) for y in np.linspace(-0.85, 0.85, count)]
    whole = union(pair(capsule((0, -1, 0), (0, 1, 0), rail), wide), *rungs)
    return [(turn(turn(whole, "x", d(-15, 15)), "z", d(-20, 20)), d.wood())]


def chain(d: Draw) -> list[Part]:
    """Links that hang in each other, every other one turned."""
    tube, count, radius = d(0.05, 0.08), d.count(3, 5), 0.26
    links = []
    for number in range(count):
        link = upright_ring(radius, tube)
        link = turn(link, "y", 90) if number % 2 else link
        links.append(move(link, y=(number - (count - 1) / 2) * (2 * radius - 1.6 * tube)))
    return [(turn(union(*links), "z", d(-60, 60)), d.steel())]


def fork(d: Draw) -> list[Part]:
    """A fork with three or four tines."""
    count, rod = d.count(3, 4), d(0.04, 0.06)
    xs = np.linspace(-0.22, 0.22, count)
    tines = [capsule((x, 0.45, 0), (x, 0.95, 0), rod) for x in xs]
    neck = [capsule((x, 0.45, 0), (0, 0.15, 0), rod * 1.1) for x in xs]
    handle = capsule((0, 0.15, 0), (0, -1.0, 0), d(0.055, 0.09))
    return [(turn(union(*tines, *neck, handle), "z", d(-50, 50)), d.steel())]


def spoon(d: Draw) -> list[Part]:
    """A shallow bowl on a handle."""
    wide, rod = d(0.24, 0.32), d(0.045, 0.075)
    bowl = cut(move(sphere(wide), y=0.75), move(sphere(wide * 0.85), y=0.75, z=wide * 0.35))
    handle = capsule((0, 0.75 - wide * 0.9, 0), (0, -1.0, 0), rod)
    return [(turn(union(bowl, handle), "z", d(-50, 50)), d.steel())]


def scissors(d: Draw) -> list[Part]:
    """Two crossed blades with finger rings."""
    angle, ring, tube = d(12, 28), d(0.2, 0.28), d(0.045, 0.075)
    blade = extrude([(-0.06, -0.1), (0.07, -0.1), (0.0, 1.0)], 0.035)
    shank = capsule((0, 0, 0), (0, -0.45, 0), tube)
    loop = move(upright_ring(ring, tube), y=-0.45 - ring)
    halves = [turn(blade, "z", side * angle) for side in (-1, 1)]
    grips = [turn(union(shank, loop), "z", side * angle) for side in (-1, 1)]
    return [(union(*halves), d.steel()), (union(*grips), d.colour())]


def coat_hanger(d: Draw) -> list[Part]:
    """A triangle of rods with a hook."""
    rod, wide = d(0.035, 0.06), d(0.8, 1.0)
    left, right, top = (-wide, -0.35, 0), (wide, -0.35, 0), (0, 0.15, 0)
    bars = union(capsule(left, right, rod), capsule(left, top, rod), capsule(right, top, rod))
    hook = move(cut(upright_ring(0.16, rod), move(box(0.16, 0.16, 1), x=-0.16, y=-0.16)), y=0.5)
    return [(union(bars, hook, capsule(top, (0, 0.34, 0), rod)), d.wood() if d.flip() else d.steel())]


def tripod(d: Draw) -> list[Part]:
    """A telescope or a camera on three legs."""
    legs = around(capsule((0, 0.1, 0.05), (0, -1.0, d(0.45, 0.65)), d(0.035, 0.06)), 3, d(0, 120))
    tube = turn(turn(cylinder(d(0.1, 0.18), 0.55), "z", 90), "z", d(-30, 10))
    return [(legs, d.wood()), (move(tube, y=0.2), d.colour())]


def picture_frame(d: Draw) -> list[Part]:
    """A frame without a picture."""
    wide, high, bar, deep = d(0.6, 1.0), d(0.6, 1.0), d(0.06, 0.13), d(0.04, 0.09)
    return [(cut(box(wide, high, deep, 0.02), box(wide - bar, high - bar, 1)), d.wood())]


def picket_fence(d: Draw) -> list[Part]:
    """Upright pickets on two rails."""
    count, half = d.count(4, 7), d(0.06, 0.09)
    pickets = [move(box(half, d(0.55, 0.65), 0.035), x=x) for x in np.linspace(-0.9, 0.9, count)]
    rails = [move(box(1.0, 0.05, 0.035), y=y, z=-0.06) for y in (-0.3, 0.3)]
    return [(union(*pickets, *rails), d.wood() if d.flip() else d.colour())]


def thin_table(d: Draw) -> list[Part]:
    """A flat top on thin legs, square or round."""
    top, leg, half = d(0.03, 0.06), d(0.035, 0.06), d(0.35, 0.6)
    wide, deep = d(0.7, 1.0), d(0.45, 0.9)
    if d.flip(0.4):
        plate, legs = cylinder(wide, top), around(move(cylinder(leg, half), z=wide * 0.7), d.count(3, 4))
    else:
        plate, legs = box(wide, top, deep), corners(cylinder(leg, half), wide - leg, deep - leg)
    return [(move(plate, y=half), d.wood()), (legs, d.wood())]


def magnifier(d: Draw) -> list[Part]:
    """A ring with a handle."""
    radius, tube = d(0.4, 0.55), d(0.05, 0.09)
    handle = capsule((0, -radius, 0), (0, -radius - d(0.6, 0.8), 0), d(0.06, 0.1))
    whole = turn(union(upright_ring(radius, tube), handle), "z", d(-60, 60))
    return [(whole, d.colour())]


def racket(d: Draw) -> list[Part]:
    """A tennis racket: an oval hoop with strings and a handle."""
    tube, string = d(0.045, 0.07), d(0.03, 0.04)
    hoop = upright_ring(0.45, tube)
    lines = [capsule((x, -0.4, 0), (x, 0.4, 0), string) for x in (-0.22, 0, 0.22)]
    lines += [capsule((-0.4, y, 0), (0.4, y, 0), string) for y in (-0.22, 0, 0.22)]
    handle = capsule((0, -0.45, 0), (0, -1.2, 0), d(0.055, 0.085))
    whole = union(hoop, *lines, handle)
    return [(turn(whole, "z", d(-55, 55)), d.colour())]


def street_lamp(d: Draw) -> list[Part]:
    """A pole with one or two arms and lamps."""
    pole, reach = d(0.035, 0.06), d(0.3, 0.5)
    arm = capsule((0, 1.0, 0), (reach, 0.95, 0), pole)
    lamp = move(sphere(d(0.1, 0.16)), x=reach, y=0.87)
    both = d.flip(0.4)
    arms, lamps = (pair(arm, 0.0), pair(lamp, 0.0)) if both else (arm, lamp)
    return [(union(cylinder(pole, 1.0), arms), d.steel()), (lamps, d.near(0.15, 0.6, 1.0))]


def wine_glass(d: Draw) -> list[Part]:
    """A thin bowl on a thin stem."""
    cup, stem, wall = d(0.35, 0.5), d(0.03, 0.05), d(0.035, 0.06)
    outside = [(0, 0.1), (cup * 0.7, 0.2), (cup, 0.55), (cup * 0.85, 1.0), (0, 1.0)]
    inside = [
        (0, 0.1 + wall),
        (cup * 0.7 - wall, 0.2 + wall),
        (cup - wall, 0.55),
        (cup * 0.85 - wall, 1.1),
        (0, 1.1),
    ]
    foot = move(cylinder(d(0.3, 0.42), 0.03), y=-0.9)
    stalk = move(cylinder(stem, 0.5), y=-0.4)
    return [(union(cut(revolve(outside), revolve(inside)), stalk, foot), d.colour())]


THIN = {
    builder.__name__: builder
    for builder in (
        thin_ring, door_key, thin_chair, thin_stool, floor_lamp, spectacles, thin_mug, basket, spoked_wheel,
        bicycle, ladder, chain, fork, spoon, scissors, coat_hanger, tripod, picture_frame, picket_fence,
        thin_table, magnifier, racket, street_lamp, wine_glass,
    )
}  # fmt: skip
