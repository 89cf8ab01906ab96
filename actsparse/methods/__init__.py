"""Dynamic activation methods, one file each. A method is its parameters; it fits a plan and opens gates."""
