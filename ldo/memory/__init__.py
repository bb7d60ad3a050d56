"""How much memory a recipe needs, found before anything is loaded."""
