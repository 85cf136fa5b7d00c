"""From a request to pictures, meshes, videos and sounds."""
