"""Train routers as the paper does, with or without the backbone: straight-through gates and widths."""
