"""The bases: one module per base, in plain Python, that never imports the serving package.

A base module declares
- `INPUTS`, `OUTPUTS`: one mapping per tensor with `name`, `dtype` and the `shape` of one row (`None` = dynamic axis);
  an output also has a `meaning`: `logits`, `probabilities`, `log_probabilities` or `independent_probabilities` of
  classes, `embedding`, or `values`, which is the default,
- `LABELS`: the names of the classes, empty for a base that does not classify,
- `IMAGE`: how an image becomes the input: `mode`, `size` (width, height), `fit`, `crop`, `resize`, and `mean` and
  `std` per channel of pixels already scaled to 0..1; or `TEXT`, how a text does: `tokenizer` (its file), `max_length`,
- `UNIT`, if it is not 1: how many consecutive rows are scored together (2 for pairs of texts),
- `FILES`: paths beside the module whose bytes decide its answers or data (the module itself counts anyway),
- `LIBRARIES`: distributions whose versions decide its answers or data,
- `build()`: a fresh `torch.nn.Module` with trained weights, in eval mode, float32, on the CPU,
- `data(split, n)`: the first `n` rows of a split (`train`, `calibration`, `gate`, `test`; all rows for `None`) as a
  tuple of input arrays and the labels (`None` without), or as an object with `len` and `batches(size, shuffle_seed)`
  that prepares rows when they are asked for; splits never share samples,
- `score(outputs, labels)`: quality as one number, higher is better.

Importing a base module stays cheap: torch and scikit-learn are imported inside the functions that need them, so that a
server whose variants are all cached starts without them.
"""
