"""One file per kind of `data:`; each gives the rows of a base as the model's inputs."""
