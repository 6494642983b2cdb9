"""The texts that stand in a graph: which words its inputs of texts are looked up by, and what its classes are called.

Encoders of categories refuse words they were not made for, or take all of them for the same, so that a trial run with
random letters would tell nothing. A graph names its words where it looks them up; from every input of texts the way
there is followed, column by column.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto, TensorProto, ValueInfoProto

_Columns = tuple[int, ...]
"""Which columns of an input (positions on its last axis) a value holds, in its order."""
_Words = tuple[tuple[str, ...], ...]
"""As `contracts.TensorSpec` has them."""

LISTS = frozenset({"cats_strings", "keys_strings", "pool_strings"})
"""Attributes of operators that look texts up: OneHotEncoder, CategoryMapper, LabelEncoder, TfIdfVectorizer."""
CLASS_NAMES = "classlabels_strings"
CHOOSING = frozenset({"ArrayFeatureExtractor", "Gather", "GatherElements"})
"""Operators that take the columns that their second input says."""
UNCHANGING = frozenset(
    {"Cast", "Flatten", "Identity", "Reshape", "Squeeze", "StringNormalizer", "Tokenizer", "Transpose", "Unsqueeze"}
)
"""Operators that hand all columns on."""
STRINGS = 8
"""`TensorProto.STRING`."""
MOST_WORDS, MOST_CHARACTERS = 32, 64
"""Kept per column, and of each."""


def known_words(graph: GraphProto) -> dict[str, _Words]:
    """Per input of texts the words that the graph looks up: for every column its own, or one list for all of them.

    Of what is looked up in a way that is not followed nothing is said; inputs without any word are left out.
    """
    follower = _Follower(graph)
    found = {item.name: follower.words(item) for item in graph.input if item.type.tensor_type.elem_type == STRINGS}
    return {name: words for name, words in found.items() if words}


def named_classes(graph: GraphProto) -> tuple[str, ...]:
    """What the classes are called, where a classifier in the graph says so; else empty."""
    lists = (item.strings for node in reversed(graph.node) for item in node.attribute if item.name == CLASS_NAMES)
    return tuple(text.decode() for text in next((found for found in lists if found), ()))


class _Value(NamedTuple):
    name: str
    columns: _Columns


class _Follower:
    """Follows values of a graph to where they are looked up."""

    def __init__(self, graph: GraphProto) -> None:
        self._constants = {item.name: item for item in graph.initializer}
        self._readers: defaultdict[str, list[NodeProto]] = defaultdict(list)
        for node in graph.node:
            for name in node.input:
                self._readers[name].append(node)

    def words(self, value: ValueInfoProto) -> _Words:
        axes = value.type.tensor_type.shape.dim
        width = (axes[-1].dim_value if axes else 1) or 1
        found: dict[int, dict[str, None]] = {column: {} for column in range(width)}
        for columns, words in self._looked_up(_Value(value.name, tuple(range(width)))):
            for column in columns:
                found[column] |= dict.fromkeys(words)
        everything = {word: None for words in found.values() for word in words}
        if not everything:
            return ()
        lists = [list(words or everything)[:MOST_WORDS] for words in found.values()]
        return tuple(map(tuple, lists))

    def _looked_up(self, value: _Value) -> Iterator[tuple[_Columns, list[str]]]:
        for node in self._readers[value.name]:
            if words := [*self._listed(node), *self._compared_with(node)]:
                yield value.columns, [word for word in words if len(word) <= MOST_CHARACTERS and word]
            elif node.op_type in CHOOSING:
                yield from self._looked_up(_Value(node.output[0], self._chosen(node, value.columns)))
            elif node.op_type in UNCHANGING:
                yield from self._looked_up(_Value(node.output[0], value.columns))

    def _listed(self, node: NodeProto) -> Iterator[str]:
        for item in node.attribute:
            if item.name in LISTS:
                yield from (text.decode(errors="replace") for text in item.strings)
            elif item.name == "keys_tensor":
                yield from _texts(item.t)

    def _compared_with(self, node: NodeProto) -> Iterator[str]:
        for name in node.input:
            if name in self._constants:
                yield from _texts(self._constants[name])

    def _chosen(self, node: NodeProto, columns: _Columns) -> _Columns:
        from onnx import numpy_helper

        places: Mapping[str, TensorProto] = self._constants
        if node.input[1] not in places:
            return columns
        chosen = numpy_helper.to_array(places[node.input[1]]).ravel().tolist()
        return tuple(columns[place] for place in chosen if -len(columns) <= place < len(columns))


def _texts(tensor: TensorProto) -> Iterator[str]:
    """Of a tensor of texts."""
    if tensor.data_type == STRINGS:
        yield from (text.decode(errors="replace") for text in tensor.string_data)
