"""Runs xatlas in a process of its own: `python xatlas_process.py IN.npz OUT.npz`.

xatlas can take hours and cannot be interrupted; a process can be ended. IN holds `vertices`, `faces`, the `piece` of
every face, `resolution` and `padding` in texels. Pieces become charts on their own, for xatlas's time grows faster than
a mesh does. Imports nothing of the package, so that it starts at once.
"""

import sys

import numpy as np
import xatlas


def main(path_in: str, path_out: str) -> None:
    with np.load(path_in) as given:
        vertices, faces, piece = given["vertices"], given["faces"], given["piece"]
        resolution, padding = int(given["resolution"]), int(given["padding"])
    atlas, used_vertices = xatlas.Atlas(), []
    for number in range(int(piece.max()) + 1):
        used, compact = np.unique(faces[piece == number], return_inverse=True)
        atlas.add_mesh(vertices[used], compact.reshape(-1, 3).astype(np.uint32))
        used_vertices.append(used)
    packing = xatlas.PackOptions()
    packing.resolution, packing.padding, packing.bilinear = resolution, padding, True
    atlas.generate(xatlas.ChartOptions(), packing)
    size = np.array([atlas.width, atlas.height], np.float32)
    origin, uvs, wedges, start = [], [], [], 0
    for number, used in enumerate(used_vertices):
        mapping, indices, piece_uvs = atlas[number]
        origin.append(used[mapping])
        uvs.append(piece_uvs * size / size.max())
        wedges.append(indices.astype(np.int64) + start)
        start += len(mapping)
    np.savez(path_out, origin=np.concatenate(origin), uvs=np.concatenate(uvs), faces=np.concatenate(wedges))


if __name__ == "__main__":
    main(*sys.argv[1:])
