"""Privacy mechanisms and the accountant that adds up what they spend."""
