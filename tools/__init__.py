"""Tools of the repository; they are not in the wheel."""
