"""Hi3D in JAX: one image to a textured 3D mesh by video diffusion."""
