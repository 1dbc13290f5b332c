"""One kind of damage a module: how it is found, how it is undone, and when it is left alone. Deinterlace and restore call them."""
