"""How much GPU memory a training needs, worked out before anything is rented."""
