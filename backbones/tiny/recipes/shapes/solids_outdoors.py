"""Solids found outdoors: buildings, plants, vehicles and animals. Every builder is a few primitives.

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
    revolve,
    sphere,
    torus,
    turn,
    union,
)  # fmt: skip

GLASS = (0.35, 0.55, 0.75)
RUBBER = (0.12, 0.12, 0.13)


def house(d: Draw) -> list[Part]:
    """A house with a gable roof, a door, a chimney."""
    x, z, wall, ridge = d(0.5, 0.8), d(0.5, 0.8), d(0.3, 0.5), d(0.35, 0.6)
    roof = extrude([(-x * 1.15, 0), (x * 1.15, 0), (0, ridge)], z * 1.1)
    parts = [(box(x, wall, z), d.near(0.12, 0.25, 0.9)), (move(roof, y=wall), d.near(0.02, 0.7, 0.7))]
    parts.append((move(box(0.14, 0.22, 0.04), y=-wall + 0.22, z=z), d.wood()))
    if d.flip():
        parts.append((move(box(0.09, 0.25, 0.09), x=x * 0.5, y=wall + 0.35), d.near(0.02, 0.5, 0.5)))
    return parts


def tower(d: Draw) -> list[Part]:
    """A round tower with a pointed roof or battlements."""
    radius, half = d(0.28, 0.42), d(0.6, 0.9)
    stone = d.near(0.1, 0.15, 0.7)
    top = move(cylinder(radius * 1.2, 0.12), y=half)
    if d.flip(0.6):
        return [
            (union(cylinder(radius, half), top), stone),
            (move(frustum(radius * 1.3, 0, 0.35), y=half + 0.45), d.colour()),
        ]
    teeth = around(move(box(0.09, 0.1, 0.07), y=half + 0.2, z=radius * 1.1), 6)
    return [(union(cylinder(radius, half), top, teeth), stone)]


def castle(d: Draw) -> list[Part]:
    """Four towers, walls and a gate."""
    half, wall, tall, radius = d(0.55, 0.7), d(0.3, 0.45), d(0.5, 0.7), d(0.16, 0.24)
    walls = cut(box(half, wall, half), move(box(half - 0.1, wall, half - 0.1), y=0.15))
    gate = union(
        move(box(0.17, 0.22, 1), y=-wall + 0.2, z=half),
        move(turn(cylinder(0.17, 1), "x", 90), y=-wall + 0.42, z=half),
    )
    towers = move(corners(cylinder(radius, tall), half, half), y=tall - wall)
    roofs = move(corners(frustum(radius * 1.3, 0, 0.22), half, half), y=2 * tall - wall + 0.2)
    return [(union(cut(walls, gate), towers), d.near(0.1, 0.15, 0.75)), (roofs, d.colour())]


def church(d: Draw) -> list[Part]:
    """A nave with a steeple at one end."""
    x, wall, tall = d(0.3, 0.42), d(0.3, 0.4), d(0.6, 0.8)
    nave = union(box(x, wall, 0.8), move(extrude([(-x, 0), (x, 0), (0, x)], 0.8), y=wall))
    steeple = move(box(0.24, tall, 0.24), y=tall - wall, z=0.6)
    spire = move(frustum(0.33, 0, d(0.25, 0.4)), y=2 * tall - wall + 0.3, z=0.6)
    return [(union(nave, steeple), d.near(0.1, 0.1, 0.9)), (spire, d.colour())]


def stairs(d: Draw) -> list[Part]:
    """Three to five steps."""
    count, wide = d.count(3, 5), d(0.4, 0.8)
    shape = [(-1.0, -1.0), (1.0, -1.0)]
    for i in range(count):
        x = 1.0 - 2.0 * i / count
        y = -1.0 + 1.6 * (i + 1) / count
        shape += [(x, y), (x - 2.0 / count, y)]
    return [(turn(extrude(shape, wide), "y", -90 if d.flip() else 0), d.colour())]


def arch(d: Draw) -> list[Part]:
    """A gate: a block with a round opening."""
    x, z, hole = d(0.7, 1.0), d(0.2, 0.45), d(0.3, 0.5)
    opening = union(move(box(hole, 0.6, 2), y=-0.6), turn(cylinder(hole, 2), "x", 90))
    return [(cut(box(x, 0.8, z), move(opening, y=-0.1)), d.colour())]


def bridge(d: Draw) -> list[Part]:
    """A bridge on two arches with rails."""
    deep, hole = d(0.25, 0.4), d(0.3, 0.4)
    deck = cut(box(1.2, 0.4, deep), move(pair(turn(cylinder(hole, 2), "x", 90), 0.55), y=-0.4))
    rails = union(*(move(box(1.2, 0.1, 0.04), y=0.48, z=s * (deep - 0.04)) for s in (-1, 1)))
    return [(deck, d.near(0.08, 0.3, 0.7)), (rails, d.colour())]


def tent(d: Draw) -> list[Part]:
    """A ridge tent with an opening."""
    x, deep = d(0.7, 1.0), d(0.6, 1.0)
    outside = extrude([(-x, -0.5), (x, -0.5), (0, 0.55)], deep)
    inside = move(extrude([(-x * 0.45, -0.6), (x * 0.45, -0.6), (0, 0.15)], deep), z=0.6)
    return [(cut(outside, inside), d.colour())]


def windmill(d: Draw) -> list[Part]:
    """A tapered mill with four sails."""
    body = frustum(d(0.4, 0.5), d(0.22, 0.32), 0.7)
    cap = move(frustum(0.36, 0.0, 0.18), y=0.85)
    blade = union(move(box(0.04, 0.75, 0.03), y=0.0), move(box(0.12, 0.25, 0.02), x=0.1, y=0.5))
    spin = d(0, 90)
    sails = union(*(turn(blade, "z", spin + 90 * i) for i in range(4)))
    return [(body, d.near(0.1, 0.15, 0.9)), (cap, d.colour()), (move(sails, y=0.6, z=0.5), d.wood())]


def tree(d: Draw) -> list[Part]:
    """A trunk with a round crown of one to four balls."""
    trunk = move(frustum(d(0.12, 0.2), 0.1, 0.5), y=-0.6)
    balls = [move(ellipsoid(0.6, d(0.45, 0.65), 0.6), y=0.3)]
    balls += [
        move(sphere(d(0.3, 0.42)), d(-0.4, 0.4), d(0.1, 0.6), d(-0.4, 0.4)) for _ in range(d.count(0, 3))
    ]
    return [(trunk, d.wood()), (blend(0.1, *balls), d.leaf())]


def pine(d: Draw) -> list[Part]:
    """A conifer of two to four cones."""
    tiers, radius, height = d.count(2, 4), d(0.55, 0.75), -0.45
    cones = []
    for _ in range(tiers):
        half = d(0.28, 0.36)
        cones.append(move(frustum(radius, 0.05, half), y=height + half))
        height, radius = height + half * 1.1, radius * 0.78
    return [(move(cylinder(d(0.1, 0.16), 0.35), y=-0.7), d.wood()), (union(*cones), d.leaf())]


def palm(d: Draw) -> list[Part]:
    """A bare trunk under arched leaves."""
    leaves = d.count(5, 7)
    reach, drop = d(0.6, 0.8), d(0.15, 0.4)
    frond = union(
        capsule((0, 0, 0), (0, 0.12, reach * 0.5), 0.1),
        capsule((0, 0.12, reach * 0.5), (0, -drop, reach), 0.08),
    )
    trunk = capsule((d(-0.15, 0.15), -1, 0), (0, 0.6, 0), 0.1)
    return [(trunk, d.wood()), (move(around(frond, leaves), y=0.6), d.leaf())]


def cactus(d: Draw) -> list[Part]:
    """A column with one or two arms in a pot."""
    arm = d(-0.2, 0.2)
    limbs = [capsule((0, -0.6, 0), (0, 0.75, 0), d(0.2, 0.28))]
    for side in (1, -1) if d.flip(0.7) else (1,):
        limbs += [
            capsule((0, arm, 0), (0.5 * side, arm, 0), 0.13),
            capsule((0.5 * side, arm, 0), (0.5 * side, arm + d(0.25, 0.5), 0), 0.13),
        ]
    parts = [(blend(0.08, *limbs), d.leaf())]
    if d.flip():
        parts.append((move(frustum(0.32, 0.45, 0.25), y=-0.75), d.near(0.05, 0.7, 0.75)))
    return parts


def mushroom(d: Draw) -> list[Part]:
    """A stalk under a cap."""
    cap = d(0.65, 0.95)
    top = cut(ellipsoid(cap, d(0.5, 0.75), cap), move(box(2, 1, 2), y=-1.05))
    stalk = move(frustum(d(0.22, 0.34), 0.2, 0.45), y=-0.4)
    return [(top, d.near(0.0, 0.8, 0.85)), (stalk, d.near(0.1, 0.15, 0.95))]


def flower(d: Draw) -> list[Part]:
    """A blossom on a stem with two leaves."""
    petals = around(move(ellipsoid(0.17, 0.1, 0.26), z=0.42), d.count(5, 8))
    tilt = d(35, 75)
    blossom = [
        (turn(petals, "x", tilt), d.colour()),
        (turn(ellipsoid(0.26, 0.16, 0.26), "x", tilt), d.near(0.14, 0.8, 0.9)),
    ]
    leaves = move(turn(ellipsoid(0.38, 0.1, 0.18), "z", d(10, 30)), x=0.3, y=-0.6)
    stem = union(
        capsule((0, -1.2, 0), (0, 0, 0), 0.08),
        leaves,
        move(turn(ellipsoid(0.35, 0.1, 0.18), "z", -20), x=-0.28, y=-0.75),
    )
    return [*((move(field, y=0.15), colour) for field, colour in blossom), (stem, d.leaf())]


def apple(d: Draw) -> list[Part]:
    """An apple, a pear or an orange with a stalk."""
    body = blend(0.3, ellipsoid(0.75, 0.68, 0.75), move(sphere(d(0.2, 0.42)), y=d(0.3, 0.75)))
    stalk = capsule((0, 0.6, 0), (0.1, 1.15, 0), 0.06)
    return [(body, d.near(0.02, 0.8, 0.85)), (stalk, d.wood())]


def carrot(d: Draw) -> list[Part]:
    """A root with leaves, tilted."""
    root = move(frustum(0.06, d(0.25, 0.36), 0.7), y=-0.3)
    leaves = union(*(capsule((0, 0.4, 0), (x, d(0.8, 1.0), 0), 0.09) for x in (-0.22, 0.0, 0.22)))
    tilt = d(-50, 50)
    return [(turn(root, "z", tilt), d.near(0.07, 0.9, 0.95)), (turn(leaves, "z", tilt), d.leaf())]


def snowman(d: Draw) -> list[Part]:
    """Two or three balls, a carrot nose, sometimes a hat."""
    radii = [d(0.48, 0.58), d(0.33, 0.42), d(0.24, 0.3)][: d.count(2, 3)]
    height, balls = -0.6, []
    for radius in radii:
        balls.append(move(sphere(radius), y=height + radius * 0.8))
        height += 1.55 * radius
    snow = d.near(0.6, 0.06, 0.97)
    nose = move(turn(frustum(0.07, 0.0, 0.16), "x", 90), y=height - radii[-1] * 0.6, z=radii[-1] + 0.1)
    parts = [(union(*balls), snow), (nose, (0.98, 0.55, 0.1))]
    if d.flip():
        brim = union(cylinder(radii[-1], 0.04), move(cylinder(radii[-1] * 0.65, 0.18), y=0.18))
        parts.append((move(brim, y=height + 0.02), RUBBER))
    return parts


def rocket(d: Draw) -> list[Part]:
    """A body, a nose and three or four fins."""
    radius, half = d(0.25, 0.36), d(0.5, 0.65)
    nose = move(revolve([(0, 0), (radius, 0), (radius * 0.8, 0.25), (radius * 0.4, 0.48), (0, 0.6)]), y=half)
    fin = extrude([(0, -0.25), (0.42, -0.45), (0.3, -0.1), (0, 0.25)], 0.05)
    fins = around(move(turn(fin, "y", -90), y=-half + 0.15, z=radius - 0.05), d.count(3, 4), 45)
    window = move(turn(cylinder(0.13, 0.05), "x", 90), y=0.2, z=radius)
    return [
        (cylinder(radius, half), d.near(0.6, 0.05, 0.92)),
        (union(nose, fins), d.near(0.0, 0.8, 0.85)),
        (window, GLASS),
    ]


def _wheels(x: float, z: float, radius: float, y: float):
    """Four wheels whose axles run along z."""
    return move(corners(turn(cylinder(radius, 0.1, 0.02), "x", 90), x, z), y=y)


def car(d: Draw) -> list[Part]:
    """A saloon car; its length runs along x."""
    low, cabin, wheel = d(0.16, 0.24), d(0.4, 0.6), d(0.18, 0.24)
    body = move(box(1.0, low, 0.42, 0.06), y=-0.1)
    roof = extrude([(-cabin, 0), (cabin, 0), (cabin * d(0.5, 0.8), 0.36), (-cabin * 0.75, 0.36)], 0.36, 0.03)
    roof = move(roof, x=d(-0.2, 0.1), y=low - 0.12)
    paint = d.colour()
    glass = move(roof, y=0.0)
    return [
        (body, paint),
        (glass, GLASS if d.flip(0.7) else paint),
        (_wheels(0.6, 0.38, wheel, -0.1 - low), RUBBER),
    ]


def truck(d: Draw) -> list[Part]:
    """A lorry: a cab before a box."""
    load, tall = d(0.55, 0.75), d(0.35, 0.5)
    cab = move(box(0.25, 0.32, 0.38, 0.05), x=0.75, y=0.02)
    cargo = move(box(load, tall, 0.4, 0.02), x=0.45 - load, y=tall - 0.28)
    bed_ = move(box(1.0, 0.06, 0.36), y=-0.33)
    return [(cab, d.colour()), (cargo, d.colour()), (union(bed_, _wheels(0.65, 0.34, 0.2, -0.42)), RUBBER)]


def bus(d: Draw) -> list[Part]:
    """A bus with a window band."""
    tall = d(0.36, 0.5)
    windows = move(box(0.9, tall * 0.3, 0.4), y=tall * 0.3)
    return [
        (box(1.0, tall, 0.38, 0.06), d.colour()),
        (windows, GLASS),
        (_wheels(0.62, 0.34, 0.18, -tall), RUBBER),
    ]


def locomotive(d: Draw) -> list[Part]:
    """A steam engine."""
    boiler = move(turn(cylinder(d(0.26, 0.34), 0.6), "z", 90), x=0.25)
    cab = move(box(0.3, 0.5, 0.36, 0.03), x=-0.6, y=0.1)
    chimney = move(frustum(0.1, d(0.12, 0.2), 0.22), x=0.65, y=0.42)
    base = move(box(0.95, 0.1, 0.34), y=-0.32)
    return [
        (union(boiler, chimney), d.colour()),
        (cab, d.colour()),
        (union(base, _wheels(0.55, 0.34, 0.22, -0.42)), RUBBER),
    ]


def boat(d: Draw) -> list[Part]:
    """A hull with a sail or a cabin."""
    hull = common(
        extrude([(-0.75, -0.35), (0.7, -0.35), (1.0, 0.1), (-0.95, 0.1)], 0.6),
        ellipsoid(1.15, 1.2, d(0.36, 0.5)),
    )
    parts = [(move(hull, y=-0.4), d.wood())]
    if d.flip(0.6):
        tall = d(0.9, 1.2)
        sail = extrude([(0.06, 0.1), (d(0.5, 0.8), 0.1), (0.06, tall)], 0.05)
        return [
            *parts,
            (move(sail, y=-0.2), (0.95, 0.94, 0.9)),
            (capsule((0, -0.4, 0), (0, tall - 0.2, 0), 0.05), d.wood()),
        ]
    cabin = move(box(d(0.3, 0.45), 0.2, 0.25, 0.03), x=-0.2, y=-0.1)
    return [*parts, (cabin, d.colour()), (move(cylinder(0.1, 0.2), x=-0.2, y=0.25), d.colour())]


def airplane(d: Draw) -> list[Part]:
    """A fuselage with wings and a tail; its length runs along z."""
    wing, sweep = d(0.75, 1.0), d(0.0, 0.35)
    body = turn(revolve([(0, -1), (0.1, -0.9), (0.2, 0), (0.19, 0.7), (0.1, 0.95), (0, 1)]), "x", 90)
    flat = extrude([(0, -0.2), (wing, -0.15 - sweep), (wing, 0.05 - sweep), (0, 0.25)], 0.05)
    wings = pair(move(turn(flat, "x", 90), z=0.1), 0.0)
    small = extrude([(0, -0.12), (0.4, -0.2), (0.4, -0.02), (0, 0.15)], 0.04)
    tail = move(union(pair(turn(small, "x", 90), 0), turn(turn(small, "x", 90), "z", 90)), z=-0.8)
    pitch = d(0, 25)
    paint = d.near(0.6, 0.1, 0.9)
    return [(turn(body, "x", -pitch), paint), (turn(union(wings, tail), "x", -pitch), d.colour())]


def balloon(d: Draw) -> list[Part]:
    """A hot-air balloon."""
    bag = blend(0.15, move(sphere(0.65), y=0.35), move(frustum(0.18, 0.5, 0.25), y=-0.25))
    ropes = corners(capsule((0, -0.75, 0), (0.05, -0.4, 0.05), 0.03), 0.1, 0.1)
    return [(bag, d.colour()), (union(ropes, move(box(0.17, 0.13, 0.17, 0.02), y=-0.85)), d.wood())]


def umbrella(d: Draw) -> list[Part]:
    """An open umbrella with a hooked handle."""
    flat = d(0.45, 0.7)
    dome = cut(ellipsoid(1, flat, 1), ellipsoid(0.92, flat - 0.09, 0.92), move(box(2, 1, 2), y=-1))
    hook = cut(move(turn(torus(0.14, 0.05), "x", 90), x=0.14, y=-0.9), move(box(1, 0.5, 1), y=-0.4))
    tilt = d(-25, 25)
    stick = union(capsule((0, flat + 0.1, 0), (0, -0.9, 0), 0.05), hook)
    return [(turn(dome, "z", tilt), d.colour()), (turn(stick, "z", tilt), d.wood())]


def fish(d: Draw) -> list[Part]:
    """A fish seen from the side, with fins."""
    body = ellipsoid(0.7, d(0.35, 0.5), d(0.2, 0.3))
    tail = move(extrude([(0.1, 0), (-0.35, 0.4), (-0.22, 0), (-0.35, -0.4)], 0.06), x=-0.65)
    fin = extrude([(-0.25, 0.25), (0.2, 0.3), (-0.2, 0.65)], 0.05)
    return [
        (body, d.colour()),
        (union(tail, fin), d.colour()),
        (move(pair_z(sphere(0.07), 0.18), x=0.45, y=0.1), RUBBER),
    ]


def pair_z(field, z: float):
    """Two copies, at +z and (mirrored) at -z."""
    return lambda p: field(np.stack([p[:, 0], p[:, 1], np.abs(p[:, 2]) - z], axis=-1))


def duck(d: Draw) -> list[Part]:
    """A rubber duck facing x."""
    body = blend(
        0.15,
        ellipsoid(0.75, 0.42, 0.5),
        move(sphere(d(0.32, 0.4)), x=0.4, y=0.6),
        capsule((-0.5, 0.1, 0), (-0.85, 0.4, 0), 0.12),
    )
    beak = move(ellipsoid(0.22, 0.08, 0.16), x=0.82, y=0.55)
    eyes = move(pair_z(sphere(0.06), 0.28), x=0.62, y=0.75)
    return [(body, d.near(0.14, 0.85, 0.98)), (beak, (0.98, 0.5, 0.1)), (eyes, RUBBER)]


def quadruped(d: Draw) -> list[Part]:
    """An animal on four legs facing x: dog, horse, elephant by proportion."""
    long, thick, leg, neck = d(0.45, 0.65), d(0.22, 0.38), d(0.3, 0.6), d(0.1, 0.55)
    head = (long + 0.25 * neck + 0.15, neck + 0.15, 0)
    limbs = corners(capsule((0, 0, 0), (0, -leg - thick, 0), d(0.08, 0.14)), long - 0.05, thick * 0.55)
    body = blend(
        0.12, capsule((-long, 0, 0), (long, 0, 0), thick), limbs, capsule((long, 0, 0), head, thick * 0.5)
    )
    snout = capsule(head, (head[0] + d(0.15, 0.35), head[1] - 0.08, 0), thick * d(0.4, 0.6))
    ears = move(pair_z(ellipsoid(0.06, d(0.12, 0.28), 0.08), thick * 0.45), x=head[0], y=head[1] + 0.22)
    tail = capsule((-long - thick, 0.1, 0), (-long - thick - 0.2, d(-0.2, 0.4), 0), 0.06)
    return [
        (blend(0.06, body, snout, move(sphere(thick * 0.75), *head)), (fur := d.near(0.08, 0.5, 0.7))),
        (union(ears, tail), fur),
    ]


def rabbit(d: Draw) -> list[Part]:
    """A sitting rabbit or bear facing the viewer."""
    ear = d(0.12, 0.4)
    body = union(ellipsoid(0.5, 0.6, 0.45), move(sphere(d(0.34, 0.44)), y=0.75))
    ears = move(pair(ellipsoid(0.13, ear, 0.09), 0.22), y=1.05 + ear * 0.8)
    feet = move(pair(ellipsoid(0.2, 0.14, 0.32), 0.3), y=-0.5, z=0.3)
    nose = move(sphere(0.07), y=0.72, z=0.4)
    return [(union(body, ears, feet), d.near(0.08, 0.3, 0.85)), (nose, RUBBER)]


def snail(d: Draw) -> list[Part]:
    """A shell on a foot facing x."""
    shell = move(turn(torus(d(0.28, 0.34), 0.24), "x", 90), x=-0.1, y=0.3)
    foot = blend(
        0.1, capsule((-0.8, -0.25, 0), (0.7, -0.25, 0), 0.17), capsule((0.7, -0.25, 0), (0.85, 0.3, 0), 0.14)
    )
    horns = pair_z(capsule((0.85, 0.3, 0), (0.95, 0.65, 0.08), 0.05), 0.04)
    return [
        (union(shell, move(turn(cylinder(0.3, 0.2), "x", 90), x=-0.1, y=0.3)), d.colour()),
        (union(foot, horns), d.near(0.1, 0.4, 0.85)),
    ]


OUTDOORS = {
    builder.__name__: builder
    for builder in (
        house, tower, castle, church, stairs, arch, bridge, tent, windmill, tree, pine, palm, cactus,
        mushroom, flower, apple, carrot, snowman, rocket, car, truck, bus, locomotive, boat, airplane,
        balloon, umbrella, fish, duck, quadruped, rabbit, snail,
    )
}  # fmt: skip
