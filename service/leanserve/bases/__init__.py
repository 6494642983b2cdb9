"""Where a base comes from: what the config's `base:` and `data:` declare is opened as the `Base` the service knows.

Opening a base and its digest import no heavy library, which is what makes a start from the cache quick: what only the
model itself can tell (output shapes, timm's preprocessing ...) is looked up once and remembered in the cache folder.
"""
