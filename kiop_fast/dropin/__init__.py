"""In place of the authors' code: their command lines, their checkpoints, their classes."""
