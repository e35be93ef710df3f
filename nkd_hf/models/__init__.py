"""Students and teachers: building, opening, preprocessing, features, saving."""
