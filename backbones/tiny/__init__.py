"""The packaged, really trained tiny models, and (in `recipes/`) the code that made them."""
