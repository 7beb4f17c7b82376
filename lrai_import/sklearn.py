"""Models of scikit-learn, in memory, to ONNX."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from typing import Any, Final

import numpy as np
import onnx
import onnx.helper

from lrai_core import CompileError, EnvironmentProblem, TensorSpec, UnsupportedOperator

OPSET: Final = {"": 17, "ai.onnx.ml": 3}
FEATURES: Final = "features"
ROWS: Final = 256  # on which what was made is compared with the model
_SAME: Final = 0.95  # of them: a threshold in single precision may send a few elsewhere
_INTS, _INT64 = onnx.AttributeProto.INTS, onnx.TensorProto.INT64
_TORN: Final = 1e-3
_BITS: Final = 2.0**-23  # of a number: as much as several roundings in single precision do
_NOUGHT: Final = 1e-30  # to which what LightGBM has on both sides of zero is nearer
_DTYPES: Final[dict[str, Any]] = {"FloatTensorType": np.float32, "Int64TensorType": np.int64}
_MISSING: Final = 0.2  # of the numbers, where some are
_SIGNED: Final = ("INT8", "INT16", "INT32", "INT64")
_INTEGERS: Final = ("BOOL", *_SIGNED, *(f"U{kind}" for kind in _SIGNED))
_REALS: Final = ("FP16", "FP32", "FP64")

_Types = Sequence[tuple[str, Any]]
_Known = Mapping[int, Any]


def convert(model: Any, inputs: Sequence[TensorSpec]) -> onnx.ModelProto:
    """Return the model in ONNX, in single precision.

    Args:
        model: Fitted: an estimator or a pipeline.
        inputs: Columns of one dimension, or one table of two; empty for the columns that the model
            asks for by their names, or else a table as wide as it was fitted with. Columns of
            numbers become one table, `features`, unless the model asks for columns by their names.
            Columns that are all that it was fitted with are taken in its order.

    Raises:
        CompileError: It cannot be converted, or answers otherwise once it is.
        EnvironmentProblem: skl2onnx is not installed, or pandas where columns of texts ask for it.
        UnsupportedOperator: It has no form in ONNX.
    """
    try:
        import skl2onnx
        from skl2onnx.common.exceptions import MissingConverter, MissingShapeCalculator
    except ImportError:
        raise EnvironmentProblem("skl2onnx is needed: pip install 'lrai[trees]'") from None
    from sklearn.base import is_classifier

    from lrai_import import trees  # which takes from here, too

    inputs = inputs or _columns(model)
    order = [*getattr(model, "feature_names_in_", ())]
    if {*order} == {spec.name for spec in inputs}:  # as the converter has no names for columns
        inputs = sorted(inputs, key=lambda spec: order.index(spec.name))
    for part in _parts(model):
        if words := _not_converted(part):
            raise CompileError(f"{type(part).__name__} {words}, which its converter does not know")
        trees.know(part)
        if hasattr(part, "flatten_transform"):
            part.flatten_transform = False  # of no matter for what it predicts
        if isinstance(getattr(part, "weights", None), list | tuple):  # of voters
            part.weights = np.array(part.weights)
    splits = any(type(part).__module__.startswith("xgboost") for part in _parts(model))
    own = {"target_opset": OPSET} | trees.converters(splits=splits)
    plain = {id(model): {"zipmap": False}} if is_classifier(model) else None
    problems = list[Exception]()
    # Some know no such option, which a pipeline gives its steps unless they have some of their own,
    # and some take no whole numbers beside others.
    none = {id(part): dict[str, bool]() for part in _parts(model)}
    for options, reals in ((plain, False), (none, False), (plain, True)):
        types = _types(model, inputs, reals=reals)
        try:
            found = skl2onnx.convert_sklearn(model, None, types, options=options, **own)
        except (MissingConverter, MissingShapeCalculator) as error:
            raise UnsupportedOperator(f"{type(model).__name__}: {first_line(error)}") from None
        except Exception as error:  # noqa: BLE001 - of converters, without a base
            problems.append(error)
        else:
            made = checked(found, types)
            _guard(made)
            _tell_two(model, made)
            _send_missing(model, made)
            known = _known(model, [*dict(types)], sum(kind.shape[1] for _, kind in types))
            _move_thresholds(model, made, types, known)
            _compare(model, made, types, known)
            return made
    raise CompileError(f"{type(model).__name__} cannot be converted: {first_line(problems[0])}")


def _not_converted(part: Any) -> str:
    """Return what of a part skl2onnx passes over, so that its graph answers otherwise."""
    losses = ("poisson", "gamma")
    infrequent = getattr(part, "_infrequent_indices", None) or ()
    chances = hasattr(getattr(part, "estimator_", part), "predict_proba")
    usual = chances / 2 * (getattr(part, "response_method", "") != "decision_function")
    known = {
        "splits by categories": np.any(getattr(part, "is_categorical_", None)),
        "has add_indicator": getattr(part, "add_indicator", False),
        "has a loss with a logarithm": hasattr(part, "_predictors") and part.loss in losses,
        "has a threshold of its own": getattr(part, "best_threshold_", usual) != usual,
        "weighs neighbours": str(getattr(part, "weights", "")) == "distance",
        "calibrates in steps": getattr(part, "method", "") == "isotonic",
        "has infrequent categories": any(one is not None for one in infrequent),
        "has a category for what is missing": any(
            len(own) and (own[-1] is None or own[-1] != own[-1])  # as NaN is
            for own in getattr(part, "categories_", None) or ()
        ),
    }
    return next((words for words, holds in known.items() if holds), "")


def _send_missing(model: Any, made: onnx.ModelProto) -> None:
    """Have every tree send missing values where the model does; its converter says nothing of it.

    Trees stand in the graph in their order in the model, under their nodes' own numbers; those of
    another kind stand between them, and have the right ones.
    """
    trees = [part.tree_ for part in _parts(model) if hasattr(part, "tree_")]
    of_trees = (node for node in made.graph.node if node.op_type.startswith("TreeEnsemble"))
    for node in sorted(of_trees, key=_isolated):
        given = {one.name: one for one in node.attribute}
        numbers, nodes = given["nodes_treeids"].ints, given["nodes_nodeids"].ints
        own = dict(zip(sizes := Counter(numbers), trees, strict=False))
        if [tree.node_count for tree in own.values()] != [*sizes.values()]:
            continue
        del trees[: len(own)]
        left: Any = {n: getattr(tree, "missing_go_to_left", None) for n, tree in own.items()}
        if any(one is None for one in left.values()):
            return
        name = "nodes_missing_value_tracks_true"
        tracks = given.get(name) or node.attribute.add(name=name, type=_INTS)
        tracks.ints[:] = [int(left[n][at]) for n, at in zip(numbers, nodes, strict=True)]


def _isolated(node: Any) -> int:
    """Return which of an isolation forest a tree is: these stand by name, the tenth before the 1st.

    Those of another kind are 0, and stay where they are.
    """
    number = node.input[0].rpartition("node_sample")[2].partition("_output")[0]
    return int(number) if number.isdecimal() else 0


def _guard(made: onnx.ModelProto) -> None:
    """Have encoders fail at a category that they do not know, as the model does.

    Their converter has them say -1. Here they look it up behind the end of a table.
    """
    for at, node in reversed([*enumerate(made.graph.node)]):
        places = [i for one in node.attribute if one.name == "values_int64s" for i in one.ints]
        if len(node.attribute) == 2 and places == [*range(len(places) or 1)]:  # without a default
            name, count = node.output[0], len(places)
            found, known = f"{name}_found", f"known_to_{name}"
            node.output[0] = found
            node.attribute.append(onnx.helper.make_attribute("default_int64", count))
            made.graph.initializer.append(onnx.helper.make_tensor(known, _INT64, [count], places))
            lookup = onnx.helper.make_node("Gather", [known, found], [name], known)
            made.graph.node.insert(at + 1, lookup)


def _tell_two(model: Any, made: onnx.ModelProto) -> None:
    """Have a discriminant of two classes be as sure as it is; its converter doubles its score."""
    for part in _parts(model):
        weights: Any = getattr(part, "coef_", ())  # which templates of others have not
        if type(part).__name__ == "LinearDiscriminantAnalysis" and len(weights) == 1:
            own = weights[0].astype(np.float32).tolist()
            for given in ({one.name: one for one in node.attribute} for node in made.graph.node):
                mine = "coefficients" in given and given["coefficients"].floats[len(own) :] == own
                if mine and given["post_transform"].s == b"SOFTMAX":
                    given["post_transform"].s = b"LOGISTIC"


def _move_thresholds(model: Any, made: onnx.ModelProto, types: _Types, known: _Known) -> None:
    """Have rows that lie on a threshold go where the model sends them.

    Boosted trees split at values that rows have. What is calculated of these in single precision,
    in which they come, lies now on this side, now on that. So thresholds make way, by less than two
    values of a column differ: by a few of the last bits of what is calculated and of its addends,
    or of the first alone where it is no sum of columns. Nothing is calculated of what is copied.
    """
    between = any(hasattr(part, "tree_") for part in _parts(model))  # values, as forests split
    splits = {b"BRANCH_LT"} if between else {b"BRANCH_LT", b"BRANCH_LEQ"}
    trees = [n for n in made.graph.node if any(splits & {*one.strings} for one in n.attribute)]
    if not (names := [*{node.input[0] for node in trees} - {*dict(types)}]):
        return
    table, probe = np.rint(_made_up(types, 3, 8)).astype(np.float32), onnx.ModelProto()
    probe.CopyFrom(made)
    probe.graph.output.extend(map(onnx.helper.make_empty_tensor_value_info, names))
    with suppress(Exception), np.errstate(all="ignore"):  # a model need not take these
        session = session_of(probe)
        found = [session.run(names, _fed(types, sign * table, known)) for sign in (0, 1, -1)]
        columns = dict(zip(names, zip(*found, strict=True), strict=True))
        for node in (node for node in trees if node.input[0] in columns):
            given = {one.name: one for one in node.attribute}
            way = -1 if b"BRANCH_LT" in given["nodes_modes"].strings else 1
            limits, places = given["nodes_values"].floats, [*given["nodes_featureids"].ints]
            zero, more, less = columns[node.input[0]]
            sums = np.isclose(more + less, 2 * zero, 0, 1e-5 * np.abs(more).max(axis=0)).all(axis=0)
            moves = ~(more[:2, :, None] == table[:2, None]).any(axis=2).all(axis=0)
            size = np.abs(values := np.array(limits))
            by = size + np.abs(values - np.where(sums, zero[0], 0)[places])
            moves = moves[places] & (size > _NOUGHT) & (size < 1 / _NOUGHT)
            limits[:] = np.where(moves, values + way * _BITS * by, values)


def _made_up(types: _Types, least: int, most: int) -> Any:
    """Return rows of numbers of all sizes between two powers of ten."""
    random, wide = np.random.default_rng(0), sum(kind.shape[1] for _, kind in types)
    return random.standard_normal((ROWS, wide)) * 10.0 ** random.integers(least, most, (ROWS, 1))


def _fed(types: _Types, rows: Any, known: _Known) -> dict[str, Any]:
    """Return rows as inputs, in which columns have values that they were fitted on, where known."""
    cells, random = rows.astype(np.float32).astype(object), np.random.default_rng(0)
    for place, values in known.items():
        cells[:, place] = values[random.integers(0, len(values), ROWS)]
    columns = np.split(cells, np.cumsum([kind.shape[1] for _, kind in types])[:-1], axis=1)
    dtypes = [_DTYPES.get(type(kind).__name__, object) for _, kind in types]
    return {n: own.astype(d) for (n, _), own, d in zip(types, columns, dtypes, strict=True)}


def session_of(made: onnx.ModelProto) -> Any:
    """Return what runs a model, on a CPU.

    Raises:
        CompileError: Nothing does, as of 2 GB.
    """
    import onnxruntime as ort

    try:
        return ort.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
    except Exception as error:  # noqa: BLE001 - of protobuf and onnxruntime, without a base
        why = "the model does not run once it is converted, so it is not"
        raise CompileError(f"{why}: {first_line(error)}") from None


def _compare(model: Any, made: onnx.ModelProto, types: _Types, known: _Known) -> None:
    """Refuse what answers otherwise than the model: converters pass over what they do not know.

    On what its encoders were fitted on, and made-up numbers, and apart from these on missing ones.
    What takes none of them, so that nothing is compared, is refused.
    """
    session, table = session_of(made), _made_up(types, 0, 4)
    table[: ROWS // 2] = np.rint(table[: ROWS // 2])
    kinds, compared = [type(kind).__name__ for _, kind in types], False
    reals = np.repeat(np.array(kinds) == "FloatTensorType", [kind.shape[1] for _, kind in types])
    missing = (np.random.default_rng(1).random(table.shape) < _MISSING) & reals
    missed = [np.where(missing, np.nan, table)] * bool(reals.any())
    # Some take no negative numbers.
    for rows in (table, np.abs(table) + 1, *missed, *_among(model, table.shape[1])):
        expected, found, feeds = list[Any](), list[Any](), dict[str, Any]()
        with warnings.catch_warnings(), suppress(Exception):  # a model need not take these
            warnings.simplefilter("ignore")
            feeds = _fed(types, rows, known)
            # In double precision, as most are fitted, and in which they may scale their columns;
            # k-means takes but what it was fitted in.
            given = {n: a.astype(float) if a.dtype == np.float32 else a for n, a in feeds.items()}
            for asked in (given, feeds):
                with suppress(Exception):
                    told = expected or _predicted(model, asked)
                    expected = [np.asarray(a).reshape(ROWS, -1) for a in told]
        if not expected:
            continue
        compared = True
        with suppress(Exception):
            found = session.run(None, feeds)
        # First what it predicts, where it is not torn, and at last how sure it is.
        torn = [_torn(expected[-1]) if len(expected) > 1 else False, False]
        if not found or not all(map(is_same, expected, (found[0], found[-1]), torn)):
            kind = f"{type(model).__name__} with these parameters"
            raise CompileError(f"{kind} gives other answers once it is converted, so it is refused")
    if not compared:
        what = "texts" if "StringTensorType" in kinds else "numbers"
        if not find_spec("pandas") and (len(types) > 1 or what == "texts"):
            raise EnvironmentProblem(f"pandas is needed to compare {what}: pip install pandas")
        raise CompileError(f"{type(model).__name__} takes no made-up {what} to be compared on")


def _among(model: Any, width: int) -> Iterator[Any]:
    """Yield rows between two support vectors each: there, far from zero, sums cancel each other."""
    for part in _parts(model):
        own = getattr(part, "support_vectors_", None)
        if isinstance(own, np.ndarray) and own.shape[1] == width:
            yield own[np.random.default_rng(2).integers(0, len(own), (ROWS, 2))].mean(axis=1)


def _known(model: Any, names: Sequence[str], width: int) -> dict[int, Any]:
    """Return values that columns were fitted on, by place, where parts of the model tell them."""
    places = {name: at for at, name in enumerate(names)} if len(names) == width else {}
    found = dict[int, Any]()
    chosen = [step for part in _parts(model) for step in getattr(part, "transformers_", ())]
    for steps in (chosen, [("", model, slice(None))]):  # what is chosen is told by its own order
        own = dict[int, Any]()
        for _, step, columns in steps:
            at = _places(columns, places, width)
            for part in _parts(step):
                for place, values in zip(at, _told(part, len(at)), strict=False):
                    own[place] = np.concatenate([own.get(place, values[:0]), values])
        found = own | found
    return found


def _places(columns: Any, places: Mapping[Any, int], width: int) -> list[int]:
    """Return the places that a step takes; none where they are told in a way of its own."""
    if isinstance(columns, slice):
        return list(range(width))[columns]
    listed = [columns] if np.isscalar(columns) else list(columns)
    if listed and isinstance(listed[0], bool | np.bool_):
        return [at for at, taken in enumerate(listed) if taken]
    at: list[Any] = [places.get(one, one) for one in listed]
    return at if all(one in range(width) for one in at) else []


def _told(part: Any, count: int) -> list[Any]:
    """Return values that a part was fitted on, for each of so many columns; [] if it says none."""
    categories = getattr(part, "categories_", None)
    if categories is not None and len(categories) == count:
        return [np.asarray(own, object) for own in categories]
    words = [str(word) for word in getattr(part, "vocabulary_", {})]
    if count != 1 or not words:
        return []
    random = np.random.default_rng(1)
    # Of few, so that some come again, also with what is no word between. Ends of lines stay.
    drawn = (" ".join(random.choice(random.choice(words, 3), 6)) for _ in range(ROWS))
    texts = [" ".join(filter(None, text.split(" "))) for text in drawn]
    return [np.array([f"{text} {text.replace(' ', ' a ')}" for text in texts], object)]


def _predicted(model: Any, feeds: Mapping[str, Any]) -> list[Any]:
    """Return what it predicts and, if it tells, how sure it is."""
    table: Any = next(iter(feeds.values()))
    if len(feeds) > 1 or (table.shape[1] == 1 and _asks_for_names(model)):
        import pandas as pd

        table = pd.DataFrame({name: column[:, 0] for name, column in feeds.items()})
    elif table.dtype == object and any(hasattr(part, "vocabulary_") for part in _parts(model)):
        table = table[:, 0]  # texts, one after the other
    if not hasattr(model, "predict"):
        made = model.transform(table)
        return [made.toarray() if hasattr(made, "toarray") else made]
    how = (model.predict, getattr(model, "predict_proba", None))
    return [np.stack(a, 1) if isinstance(a := ask(table), list) else a for ask in how if ask]


def _torn(scores: Any) -> Any:
    """Return which rows have two best classes: which one is told is chance."""
    if scores.dtype.kind != "f" or scores.shape[1] < 2:
        return False
    return np.diff(np.sort(scores, axis=1)[:, -2:])[:, 0] < _TORN


def is_same(expected: Any, found: Any, torn: Any = 0) -> bool:
    """Return whether nearly all rows are, or are torn; what is no number is compared as it is."""
    first, second = expected, np.asarray(found).reshape(ROWS, -1)
    first, second = (a.astype(int) if a.dtype == bool else a for a in (first, second))
    if first.shape != second.shape:
        return False
    if first.dtype.kind == second.dtype.kind == "f":
        with np.errstate(over="ignore"):  # what is infinite in single precision is so
            first = first.astype(second.dtype)
    if {first.dtype.kind, second.dtype.kind} & set("OSU"):
        same = first.astype(str) == second.astype(str)
    else:  # what is small is told by its own size
        size = min(1.0, np.abs(first).max(initial=1e-6, where=np.isfinite(first)))
        same = np.isclose(second, first, 1e-3, 1e-4 * size, equal_nan=True)
    return bool((same.all(axis=1) | torn).mean() >= _SAME)


def width(inputs: Sequence[TensorSpec]) -> int:
    """Return how many features a table has that is made of these inputs.

    Raises:
        CompileError: They are no columns, and no table.
    """
    if len(inputs) == 1 and len(inputs[0].shape) == 2 and isinstance(inputs[0].shape[1], int):
        return inputs[0].shape[1]
    if inputs and all(spec.shape[1:] in ((), (1,)) for spec in inputs):
        return len(inputs)
    shapes = ", ".join(f"{spec.name!r} {list(spec.shape)}" for spec in inputs) or "none"
    raise CompileError(f"columns, or one table of known width, are needed; the inputs: {shapes}")


def _columns(model: Any) -> tuple[TensorSpec, ...]:
    """Return the columns that a model asks for by their names, texts where its encoders know such.

    None where it takes a table.
    """
    names = [*getattr(model, "feature_names_in_", ())] if _asks_for_names(model) else []
    known = _known(model, names, len(names))
    texts = {names[at] for at, values in known.items() if isinstance(values[0], str)}
    kinds = {name: "BYTES" if name in texts else "FP32" for name in names}
    return tuple(TensorSpec(name=n, datatype=kind, shape=("batch",)) for n, kind in kinds.items())


def _types(
    model: Any, inputs: Sequence[TensorSpec], *, reals: bool = False
) -> list[tuple[str, Any]]:
    """Return what skl2onnx is told of the inputs; `reals`: every number has a fraction."""
    from skl2onnx.common import data_types as kinds

    if not inputs:
        if (wide := getattr(model, "n_features_in_", None)) is None:
            why = "the model does not say how many columns it takes: a signature is needed"
            raise CompileError(why)
        return [(FEATURES, kinds.FloatTensorType([None, int(wide)]))]
    numbers = all(spec.datatype in (*_INTEGERS, *_REALS) for spec in inputs)
    if numbers and not _asks_for_names(model):
        name = inputs[0].name if len(inputs) == 1 else FEATURES
        return [(name or FEATURES, kinds.FloatTensorType([None, width(inputs)]))]
    of_each = width(inputs) // len(inputs)
    types = dict.fromkeys(_INTEGERS, kinds.FloatTensorType if reals else kinds.Int64TensorType)
    types |= dict.fromkeys(_REALS, kinds.FloatTensorType) | {"BYTES": kinds.StringTensorType}
    return [(spec.name, types[spec.datatype]([None, of_each])) for spec in inputs]


def _parts(model: Any) -> Iterator[Any]:
    """Yield a model, and the models that it is made of."""
    yield model
    inner = ("best_estimator_", "estimator_" if hasattr(model, "estimator_") else "estimator")
    # Of what selects columns by a model of its own, that one is not in the graph.
    held = [getattr(model, name, None) for name in inner if not hasattr(model, "get_support")]
    places = ("steps", "transformers_", "transformer_list")
    held += [step for place in places for _, step, *_ in getattr(model, place, [])]
    for name in ("estimators_", "calibrated_classifiers_"):  # lists, or arrays of several axes
        held += np.ravel(np.array(getattr(model, name, []), object)).tolist()
    held.append(getattr(model, "final_estimator_", None))  # behind the others, as in the graph
    for part in held:
        if part is not None and not isinstance(part, str):  # "passthrough", "drop"
            yield from _parts(part)


def _asks_for_names(model: Any) -> bool:
    from sklearn.compose import ColumnTransformer

    return any(isinstance(part, ColumnTransformer) for part in _parts(model))


def checked(found: Any, types: _Types) -> onnx.ModelProto:
    """Return what a converter gave, whose inputs have their own names.

    Raises:
        CompileError: It is no model.
    """
    if not isinstance(found, onnx.ModelProto):
        raise CompileError(f"the converter gave a {type(found).__name__}")
    for node in found.graph.node:
        if node.op_type == "StringNormalizer":  # else of a locale that few images have
            node.attribute.append(onnx.helper.make_attribute("locale", "C.UTF-8"))
    graph, given = found.graph, [name for name, _ in types]  # which the converter has changed
    names = {value.name: f"{value.name}_predicted" for value in graph.output if value.name in given}
    names |= {value.name: name for value, name in zip(graph.input, given, strict=True)}
    # Chances of several labels come label by label, and are told row by row.
    several = [value for value in graph.output if len(value.type.tensor_type.shape.dim) == 3]
    names |= {value.name: f"{value.name}_by_label" for value in several}
    for value in (*graph.input, *graph.output):
        value.name = names.get(value.name, value.name)
        if len(dims := value.type.tensor_type.shape.dim) in (1, 2):
            dims[0].ClearField("value")  # as many as rows, where LightGBM's says 1
    for node in graph.node:
        for ends in (node.input, node.output):
            ends[:] = [names.get(name, name) for name in ends]
    for value in several:
        inner, value.name = value.name, value.name.removesuffix("_by_label")
        graph.node.append(onnx.helper.make_node("Transpose", [inner], [value.name], perm=(1, 0, 2)))
        labels, rows, _ = value.type.tensor_type.shape.dim
        rows.dim_value, labels.dim_param = labels.dim_value, "rows"
    return found


def first_line(error: Exception) -> str:
    """Return the first line of what an error says, or its name."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
