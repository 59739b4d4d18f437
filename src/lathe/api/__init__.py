"""What a user holds: a model, and what is done to it. `import lathe` gives all of it by name."""
