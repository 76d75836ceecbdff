"""The networks of Hi3D: arrays in, arrays out. They know nothing of noise levels, files or meshes."""
