"""From a request to pictures and meshes."""
