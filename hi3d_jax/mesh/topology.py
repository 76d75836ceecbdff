"""What holds a mesh together: closedness, components, holes, and one clean body out of many pieces."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
from jaxtyping import Float, Int
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from hi3d_jax.mesh.triangles import Mesh, MeshError, check_mesh, same_position

# Holes with more edges than this are no damage of decimation but missing surface.
MAX_HOLE_EDGES = 400
REPAIR_ROUNDS = 4


@dataclasses.dataclass(frozen=True)
class MeshReport:
    """What a user asks of a mesh, its vertices joined where they coincide.

    `volume` and `area` in world units; `genus` counts the handles of a watertight mesh of one component (else None).
    """

    watertight: bool
    components: int
    euler: int
    genus: int | None
    faces: int
    vertices: int
    volume: float
    area: float


def mesh_report(mesh: Mesh) -> MeshReport:
    """The facts about `mesh` that mesh_report.json states."""
    faces = same_position(mesh.vertices)[mesh.faces]
    num_vertices = len(np.unique(faces))
    num_edges = len(np.unique(_edge_keys(np.sort(_edges(faces), axis=1), num_vertices)))
    euler = num_vertices - num_edges + len(faces)
    components, closed = int(component_of_faces(faces).max()) + 1, _is_closed(faces)
    genus = (2 - euler) // 2 if closed and components == 1 else None
    corners = mesh.triangles.astype(np.float64)
    area = np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1).sum() / 2
    volume = float(signed_volumes(mesh).sum())
    return MeshReport(closed, components, euler, genus, len(faces), num_vertices, volume, float(area))


def is_watertight(mesh: Mesh) -> bool:
    """Whether every edge, vertices joined where they coincide, belongs to two faces that run along it oppositely."""
    return _is_closed(same_position(mesh.vertices)[mesh.faces])


def clean(mesh: Mesh) -> Mesh:
    """One watertight body, outward faces: the component with the largest volume, small holes filled.

    Coinciding vertices are joined, collapsed faces dropped, inner cavities and floating pieces (components of their
    own) removed; uvs and colours are dropped, since they do not survive joining. Raises `MeshError` when it cannot be
    closed.
    """
    check_mesh(mesh)
    joined = _join(mesh)
    if not _is_closed(joined.faces):
        joined = _closed(joined)
    component = component_of_faces(joined.faces)
    volumes = np.bincount(component, weights=signed_volumes(joined))
    largest = int(np.abs(volumes).argmax())
    faces = joined.faces[component == largest]
    if volumes[largest] < 0:
        faces = faces[:, ::-1]
    return _without_unused(joined.vertices, faces)


def signed_volumes(mesh: Mesh) -> Float[np.ndarray, " f"]:
    """Signed volumes of the tetrahedra between the origin and each face; over a closed mesh they sum to its volume."""
    a, b, c = mesh.triangles.astype(np.float64).transpose(1, 0, 2)
    return np.einsum("fi,fi->f", a, np.cross(b, c)) / 6


def component_of_faces(faces: Int[np.ndarray, "f 3"]) -> Int[np.ndarray, " f"]:
    """For each face the number of its component; faces that share an edge are in one."""
    keys = _edge_keys(np.sort(_edges(faces), axis=1), int(faces.max()) + 1)
    edge = np.unique(keys, return_inverse=True)[1]
    face = np.tile(np.arange(len(faces)), 3)
    num_nodes = len(faces) + int(edge.max()) + 1
    links = coo_array((np.ones(len(edge), np.int8), (face, len(faces) + edge)), shape=(num_nodes, num_nodes))
    return np.unique(connected_components(links, directed=False)[1][: len(faces)], return_inverse=True)[1]


def _edges(faces: Int[np.ndarray, "f 3"]) -> Int[np.ndarray, "e 2"]:
    """Directed edges: all first edges of the faces, then all second, then all third ones."""
    return np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])


def _edge_keys(edges, base: int):
    return edges[:, 0].astype(np.int64) * base + edges[:, 1]


def _is_closed(faces: Int[np.ndarray, "f 3"]) -> bool:
    edges, base = _edges(faces), int(faces.max()) + 1
    along, against = np.sort(_edge_keys(edges, base)), np.sort(_edge_keys(edges[:, ::-1], base))
    return bool((along[1:] != along[:-1]).all() and (along == against).all())


def _join(mesh: Mesh) -> Mesh:
    position = same_position(mesh.vertices)
    first = np.unique(position, return_index=True)[1]
    faces = position[mesh.faces].astype(np.int32)
    collapsed = (faces == np.roll(faces, 1, axis=1)).any(axis=1)
    if collapsed.all():
        raise MeshError(f"all {len(faces)} faces have collapsed to lines; there is no surface left to clean")
    return Mesh(mesh.vertices[first], faces[~collapsed])


def _without_unused(vertices, faces) -> Mesh:
    used, compact = np.unique(faces, return_inverse=True)
    return Mesh(vertices[used], compact.reshape(-1, 3).astype(np.int32))


def _closed(mesh: Mesh) -> Mesh:
    """Removes faces at edges that too many share and fills holes; a few rounds, since one can cause the other."""
    for _ in range(REPAIR_ROUNDS):
        mesh = _fill_holes(_without_crowded_edges(mesh))
        if _is_closed(mesh.faces):
            return mesh
    raise MeshError("the surface has holes or edges that cannot be closed; mesh it again at another resolution")


def _without_crowded_edges(mesh: Mesh) -> Mesh:
    edges, base = _edges(mesh.faces), len(mesh.vertices)
    undirected = _edge_keys(np.sort(edges, axis=1), base)
    directed = _edge_keys(edges, base)
    crowded = np.zeros(len(edges), bool)
    for keys, most in ((undirected, 2), (directed, 1)):
        _, inverse, counts = np.unique(keys, return_inverse=True, return_counts=True)
        crowded |= counts[inverse] > most
    bad = crowded.reshape(3, -1).any(axis=0)
    if bad.all():
        raise MeshError("every face of the mesh shares an edge with too many others; it bounds no volume")
    return dataclasses.replace(mesh, faces=mesh.faces[~bad])


def _fill_holes(mesh: Mesh) -> Mesh:
    """Closes each loop of edges that only one face has by a fan around its centre."""
    edges, base = _edges(mesh.faces), len(mesh.vertices)
    open_edges = edges[~np.isin(_edge_keys(edges, base), _edge_keys(edges[:, ::-1], base))]
    if len(open_edges) == 0:
        return mesh
    vertices, fans = [mesh.vertices], [mesh.faces]
    for loop in _loops(open_edges):
        centre = base + len(vertices) - 1
        vertices.append(mesh.vertices[loop].mean(axis=0, keepdims=True))
        onward = np.roll(loop, -1)
        fans.append(np.stack([onward, loop, np.full(len(loop), centre)], axis=1).astype(np.int32))
    return Mesh(np.concatenate(vertices), np.concatenate(fans))


def _loops(open_edges: Int[np.ndarray, "e 2"]) -> list[Int[np.ndarray, " n"]]:
    """The open edges, chained into closed loops; where loops touch in a vertex, the first onward edge is taken."""
    onward: dict[int, list[int]] = {}
    for start, end in open_edges.tolist():
        onward.setdefault(start, []).append(end)
    loops = []
    while onward:
        path = [next(iter(onward))]
        place = {path[0]: 0}
        while True:
            following = onward.get(path[-1])
            if not following:
                raise MeshError("the surface's open edges form no loops; mesh it again at another resolution")
            vertex = following.pop()
            if not following:
                del onward[path[-1]]
            if vertex in place:
                break
            place[vertex] = len(path)
            path.append(vertex)
        # The loop begins where the path meets itself; what led there is put back.
        for start, end in itertools.pairwise(path[: place[vertex] + 1]):
            onward.setdefault(start, []).append(end)
        loop = path[place[vertex] :]
        if len(loop) > MAX_HOLE_EDGES:
            raise MeshError(f"the surface has a hole of {len(loop)} edges; it is not closed: fit or mesh it again")
        loops.append(np.array(loop))
    return loops
