"""The estimators: scikit-learn's contract, and a transformer that computes each text once."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from fakes import CountingBackbone
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

from embedcache.errors import FeatureError, InputError, SpecError, TrainingError
from embedcache.estimator import FeatureExtractor, HeadClassifier, HeadRegressor, extractor
from embedcache.heads import TrainedHead

N, D, C = 151, 7, 3
GENERATOR = np.random.default_rng(5)
X = GENERATOR.normal(size=(N, D)).astype(np.float32) * np.linspace(0.5, 20, D).astype(np.float32) + 3
Y = ((X - 3) @ GENERATOR.normal(size=(D, C))).argmax(axis=1)
NAMES = np.array(["bad, or worse", "så där", "好\n"])
VALUES = X @ np.arange(1.0, 1 + D) + 17
MLP: dict[str, Any] = {"options": {"hidden": [16]}, "epochs": 12, "batch_size": 64, "learning_rate": 0.05}

# scikit-learn's own checks, all of them.

STOCHASTIC = {
    "check_sample_weight_equivalence_on_dense_data": "a row of weight 2 is in one minibatch, two equal rows may be in "
    "two: equal in expectation only, as for every estimator that takes stochastic steps"
}
CHECKED: list[tuple[Any, dict[str, str]]] = [
    (HeadClassifier(), {}),
    (HeadRegressor(), {}),
    (HeadClassifier("mlp", **MLP), STOCHASTIC),
    (HeadRegressor("mlp", **MLP), STOCHASTIC),
    (HeadClassifier("logistic-regression"), {}),
    (HeadRegressor("ridge"), {}),
]


@pytest.mark.parametrize(("estimator", "failing"), CHECKED, ids=["C", "R", "C-mlp", "R-mlp", "C-sklearn", "R-sklearn"])
@pytest.mark.filterwarnings("ignore")  # the checks raise and look at warnings themselves
def test_scikit_learns_contract(estimator: Any, failing: dict[str, str]) -> None:
    results = check_estimator(estimator, expected_failed_checks=failing, on_skip=None)
    # Array API is looked at in a process of its own, below: it needs an environment variable that SciPy reads once.
    assert {each["check_name"] for each in results if each["status"] == "skipped"} <= {"check_array_api_input"}
    assert {each["check_name"] for each in results if each["status"] == "xfail"} == set(failing)
    assert len(results) >= 60


def test_scikit_learns_contract_with_array_api() -> None:
    code = (
        "from sklearn.utils.estimator_checks import check_estimator\n"
        "from embedcache.estimator import HeadClassifier, HeadRegressor\n"
        "print({each['status'] for e in (HeadClassifier(), HeadRegressor()) for each in check_estimator(e)})"
    )
    environment = {**os.environ, "SCIPY_ARRAY_API": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == "{'passed'}"


# Classification.


def test_the_default_is_scikit_learns_logistic_regression() -> None:
    scaled = make_pipeline(StandardScaler(), LogisticRegression(C=1 / 0.7, tol=1e-10, max_iter=10_000))
    theirs = scaled.fit(X.astype(np.float64), Y)
    ours = HeadClassifier(l2=0.7).fit(X, Y)
    np.testing.assert_allclose(ours.predict_proba(X), theirs.predict_proba(X), atol=2e-4)
    assert (ours.predict(X) == theirs.predict(X)).all()
    assert ours.score(X, Y) > 0.9


@pytest.mark.parametrize("estimator", [HeadClassifier(), HeadClassifier("mlp", **MLP), HeadClassifier("knn")])
@pytest.mark.parametrize("labels", [NAMES[Y], NAMES[Y].astype(object), Y * 10 - 7, Y == 1, Y.astype(float)])
def test_labels_of_any_kind(estimator: HeadClassifier, labels: Any) -> None:
    fitted = clone(estimator).fit(X, labels)
    assert fitted.classes_.tolist() == sorted(set(labels.tolist()))
    assert fitted.predict(X).dtype == labels.dtype
    assert fitted.score(X, labels) > 0.8
    p = fitted.predict_proba(X)
    np.testing.assert_allclose(p.sum(axis=1), 1, rtol=1e-6)
    assert (fitted.classes_[p.argmax(axis=1)] == fitted.predict(X)).all()
    decision = fitted.decision_function(X)
    assert decision.shape == ((N,) if len(fitted.classes_) == 2 else (N, 3))
    if decision.ndim == 1:
        assert (fitted.classes_[(decision > 0).astype(int)] == fitted.predict(X)).mean() > 0.98  # ties of neighbours


def test_class_weights_have_the_labels_of_y() -> None:
    labels = NAMES[Y]
    even = HeadClassifier().fit(X, labels).predict(X)
    heavy = HeadClassifier(class_weight={NAMES[1]: 1000.0, "not there": 5.0}).fit(X, labels).predict(X)
    assert (heavy == NAMES[1]).sum() > (even == NAMES[1]).sum()
    weight = np.where(labels == NAMES[1], 3.0, 1.0)
    np.testing.assert_allclose(
        HeadClassifier(class_weight={NAMES[1]: 3.0}, standardize=False).fit(X, labels).predict_proba(X),
        HeadClassifier(standardize=False).fit(X, labels, weight).predict_proba(X), atol=1e-5,
    )  # fmt: skip
    assert HeadClassifier(class_weight="balanced").fit(X, labels).score(X, labels) > 0.9


@given(seed=st.integers(0, 999))
@settings(max_examples=10)
def test_a_weight_is_a_number_of_copies(seed: int) -> None:
    weights = np.random.default_rng(seed).integers(0, 4, N)
    copies = np.repeat(np.arange(N), weights)
    weighted = HeadClassifier().fit(X.astype(np.float64), Y, weights).predict_proba(X)
    np.testing.assert_allclose(weighted, HeadClassifier().fit(X[copies], Y[copies]).predict_proba(X), atol=1e-4)


def test_several_labels_a_row() -> None:
    several = np.stack([X[:, 0] > 3, X[:, 1] + X[:, 2] > 6, X[:, 3] > 40], axis=1).astype(int)  # the last is never on
    for estimator in (HeadClassifier(), HeadClassifier("mlp", **MLP), HeadClassifier("hist-gradient-boosting")):
        fitted = clone(estimator).fit(X, several)
        assert fitted.classes_.tolist() == [0, 1, 2]
        assert fitted.predict(X).shape == fitted.predict_proba(X).shape == fitted.decision_function(X).shape == (N, 3)
        assert fitted.predict(X).dtype == several.dtype
        assert (fitted.predict(X)[:, :2] == several[:, :2]).mean() > 0.9
        assert not fitted.predict(X)[:, 2].any()


def test_several_classes_a_row_are_refused() -> None:
    with pytest.raises(ValueError, match="1d array"):
        HeadClassifier().fit(X, np.stack([Y, Y], axis=1))


def test_early_stopping_holds_rows_out_and_calibrates() -> None:
    settings = MLP | {"epochs": 200}
    fitted = HeadClassifier("mlp", early_stopping=True, patience=2, metric="log_loss", **settings).fit(X, Y)
    assert fitted.n_iter_ == len(fitted.history_) < 200
    assert "validation_log_loss" in fitted.history_[0]
    assert set(fitted.head_.calibration) == {"temperature"}
    weighted = HeadClassifier("mlp", early_stopping=True, **MLP).fit(X, Y, np.ones(N))
    assert weighted.head_.calibration


def test_ctrl_c_stops_a_search_too(monkeypatch: pytest.MonkeyPatch) -> None:
    from embedcache.train.minibatch import HeadLearner

    steps: list[int] = []

    def step(self: HeadLearner, batch: Any) -> Any:
        steps.append(len(steps))
        if len(steps) == 4:
            raise KeyboardInterrupt
        return original(self, batch)

    original = HeadLearner.step
    monkeypatch.setattr(HeadLearner, "step", step)
    with pytest.raises(KeyboardInterrupt):
        GridSearchCV(HeadClassifier("mlp", **MLP), {"l2": [1, 2]}, cv=2).fit(X, Y)
    assert len(steps) == 4


# Regression.


def test_regression_reaches_the_ridge_solution() -> None:
    theirs = make_pipeline(StandardScaler(), Ridge(1e-6)).fit(X.astype(np.float64), VALUES)
    ours = HeadRegressor(l2=1e-6).fit(X, VALUES)
    np.testing.assert_allclose(ours.predict(X), theirs.predict(X), rtol=1e-4, atol=1e-2)
    assert ours.predict(X).dtype == np.float64
    assert HeadRegressor("mlp", **(MLP | {"epochs": 60})).fit(X, VALUES).score(X, VALUES) > 0.9


@pytest.mark.parametrize("estimator", [HeadRegressor(), HeadRegressor("mlp", **MLP), HeadRegressor("knn")])
def test_several_targets(estimator: HeadRegressor) -> None:
    targets = np.stack([VALUES, -100 * VALUES], axis=1)
    fitted = clone(estimator).fit(X, targets)
    assert fitted.predict(X).shape == (N, 2)
    assert fitted.score(X, targets) > 0.5
    assert fitted.head_.class_names == ("target0", "target1")


# In the company of the rest of scikit-learn.


def test_in_a_pipeline_a_search_and_a_cross_validation() -> None:
    assert cross_val_score(HeadClassifier(), X, NAMES[Y], cv=3).mean() > 0.8
    assert cross_val_score(HeadRegressor(), X, VALUES, cv=3).mean() > 0.9
    pipeline = make_pipeline(StandardScaler(), HeadClassifier("mlp", **MLP))
    grid = {
        "headclassifier__learning_rate": np.array([0.05, 0.1]),
        "headclassifier__options": [{"hidden": (np.int64(16),)}, {"hidden": [8], "activation": "gelu"}],
        "headclassifier__epochs": np.array([3]),
        "headclassifier__random_state": np.array([1]),
    }
    search = GridSearchCV(pipeline, grid, cv=2).fit(X, NAMES[Y])
    assert search.best_score_ > 0.5
    assert search.predict(X).dtype == NAMES.dtype


def test_data_frames_bring_their_names() -> None:
    frame = pd.DataFrame(X, columns=[f"column {at}" for at in range(D)])
    fitted = HeadClassifier().fit(frame, pd.Series(NAMES[Y]))
    assert fitted.feature_names_in_.tolist() == list(frame.columns)
    assert fitted.score(frame, NAMES[Y]) > 0.9
    with pytest.raises(ValueError, match="feature names"):
        fitted.predict(frame[frame.columns[::-1]])
    several = pd.DataFrame({"a": X[:, 0] > 3, "b": X[:, 1] > 3}).astype(int)
    assert HeadClassifier().fit(frame, several).predict(frame).shape == (N, 2)


def test_heads_that_attend_take_several_vectors_a_row() -> None:
    layers = np.stack([X[:, :5], -X[:, :5], X[:, 2:]], axis=1)
    fitted = HeadClassifier("attention-pooling", options={"width": 16}, epochs=10).fit(layers, Y)
    assert fitted.predict(layers).shape == (N,)
    assert HeadClassifier("attention", options={"width": 16}, epochs=1).__sklearn_tags__().input_tags.three_d_array
    assert cross_val_score(HeadClassifier("attention", options={"width": 16}, epochs=2), layers, Y, cv=2).shape == (2,)
    with pytest.raises(FeatureError, match="nothing to attend to"):
        HeadClassifier("attention").fit(X, Y)
    with pytest.raises(ValueError, match="dim 3"):
        HeadClassifier().fit(layers, Y)


def test_one_random_state_one_head() -> None:
    first, again, other = (HeadClassifier("mlp", random_state=seed, **MLP).fit(X, Y) for seed in (3, 3, 4))
    assert np.array_equal(first.predict_proba(X), again.predict_proba(X))
    assert not np.array_equal(first.predict_proba(X), other.predict_proba(X))
    state = HeadClassifier("mlp", random_state=np.random.RandomState(7), **MLP).fit(X, Y)
    assert state.predict_proba(X).shape == (N, C)
    np.random.seed(3)
    assert HeadClassifier("mlp", random_state=None, **MLP).fit(X, Y).score(X, Y) > 0.5


def test_a_fitted_head_pickles_and_can_be_saved_as_a_bundle(tmp_path: Path) -> None:
    fitted = HeadClassifier("mlp", **MLP).fit(X, NAMES[Y])
    expected = fitted.predict_proba(X)
    assert np.array_equal(pickle.loads(pickle.dumps(fitted)).predict_proba(X), expected)
    fitted.head_.save_pretrained(tmp_path / "run")
    head = TrainedHead.from_pretrained(tmp_path / "run")
    assert head.class_names == tuple(NAMES)
    assert np.array_equal(head.probabilities(X), expected)


@pytest.mark.parametrize(
    ("estimator", "error", "said"),
    [
        (HeadClassifier("mpl"), SpecError, r"no head 'mpl' \(did you mean mlp\?\)"),
        (HeadClassifier("mlp", options={"hiden": [3]}), SpecError, "did you mean hidden"),
        (HeadClassifier("mlp", solver="convex"), SpecError, "convex solver is for linear heads"),
        (HeadClassifier("mlp", engine="jax"), SpecError, "the engine 'jax' has no head"),
        (HeadClassifier(epochs=0), SpecError, "epochs is 0"),
        (HeadClassifier(learning_rate=-1.0), SpecError, "learning_rate is -1"),
        (HeadClassifier("mlp", metric="acuracy"), SpecError, "acuracy"),
        (HeadClassifier(random_state=-1), SpecError, "seed is -1"),
    ],
)
def test_a_wrong_parameter_is_refused_when_fitting(estimator: Any, error: type, said: str) -> None:
    with pytest.raises(error, match=said):
        estimator.fit(X, Y)


def test_rows_that_cannot_be_learnt_from() -> None:
    with pytest.raises(TrainingError, match="all 151 training rows have the class"):
        HeadClassifier().fit(X, np.zeros(N))
    with pytest.raises(ValueError, match="zero"):
        HeadClassifier().fit(X, Y, np.zeros(N))
    with pytest.raises(TrainingError, match="leaves one sample"):
        HeadClassifier().fit(X, Y, np.arange(N) == 5)
    with pytest.raises(ValueError, match="NaN"):
        HeadClassifier().fit(np.where(np.arange(N)[:, None] == 3, np.nan, X), Y)
    with pytest.raises(NotFittedError):
        HeadClassifier().predict(X)


def test_a_scikit_learn_head_imports_neither_torch_nor_a_backbone() -> None:
    code = (
        "import numpy as np, sys\n"
        "from embedcache import HeadClassifier\n"
        "X, y = np.eye(7), np.arange(7) % 2\n"
        "for head in ('logistic-regression', 'knn', 'hist-gradient-boosting'):\n"
        "    options = {'n_neighbors': 3} if head == 'knn' else None\n"
        "    HeadClassifier(head, engine='sklearn', options=options).fit(X, y).predict(X)\n"
        "print([name for name in ('torch', 'transformers', 'h5py') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stderr


# FeatureExtractor.

TEXTS = [f"text {'word ' * (at % 5)}{at}" for at in range(61)]
LABELS = np.array([at % 2 for at in range(61)])


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> CountingBackbone:
    """A backbone behind every extractor that counts what it computes."""
    backbone = CountingBackbone()
    monkeypatch.setattr(extractor, "_loaded", lambda *settings: backbone)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return backbone


def test_each_text_is_computed_once_however_often_a_pipeline_is_fitted(counting: CountingBackbone) -> None:
    pipeline = make_pipeline(FeatureExtractor(), LogisticRegression())
    for _ in range(3):
        pipeline.fit(TEXTS, LABELS)
        pipeline.predict(TEXTS[:7])
    assert sorted(counting.rows_seen) == sorted(text.encode() for text in TEXTS)
    search = {"logisticregression__C": [0.1, 1, 10]}
    GridSearchCV(pipeline, search, cv=5).fit([*TEXTS, "a new one"], np.append(LABELS, 1))
    assert sorted(counting.rows_seen) == sorted(text.encode() for text in [*TEXTS, "a new one"])
    calls = counting.forward_calls
    assert clone(pipeline).fit(TEXTS[::-1] + TEXTS, np.append(LABELS[::-1], LABELS)).score(TEXTS, LABELS) >= 0.0
    assert counting.forward_calls == calls


@given(order=st.lists(st.integers(0, 60), min_size=1, max_size=20))
def test_features_are_those_of_their_text_in_any_order(order: list[int], tmp_path_factory: Any) -> None:
    backbone = CountingBackbone()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extractor, "_loaded", lambda *settings: backbone)
        made = FeatureExtractor(cache_dir=tmp_path_factory.getbasetemp() / "in any order").fit(TEXTS)
        found = made.transform([TEXTS[at] for at in order])
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, np.stack([backbone.vector(TEXTS[at].encode()) for at in order]))


@pytest.mark.parametrize(
    "texts",
    [TEXTS, tuple(TEXTS), np.array(TEXTS), np.array(TEXTS)[:, None], pd.Series(TEXTS), pd.DataFrame({"text": TEXTS})],
    ids=["list", "tuple", "array", "column of an array", "series", "frame"],
)
def test_texts_of_any_container(counting: CountingBackbone, texts: Any) -> None:
    found = FeatureExtractor().fit_transform(texts)
    np.testing.assert_array_equal(found, np.stack([counting.vector(text.encode()) for text in TEXTS]))


def test_names_and_output(counting: CountingBackbone) -> None:
    made = FeatureExtractor().fit(TEXTS)
    assert made.get_feature_names_out().tolist() == [f"feature{at}" for at in range(5)]
    frame = made.set_output(transform="pandas").transform(pd.DataFrame({"text": TEXTS}, index=range(100, 161)))
    assert frame.columns.tolist() == made.get_feature_names_out().tolist()
    assert frame.index.tolist() == list(range(100, 161))
    assert repr(FeatureExtractor("a/model", "cls@-2")) == "FeatureExtractor(model='a/model', pooling='cls@-2')"
    assert clone(made).get_params() == made.get_params()
    assert make_pipeline(made, HeadClassifier()).fit(TEXTS, LABELS).predict(TEXTS).shape == (61,)


def test_each_setting_has_a_cache_of_its_own(counting: CountingBackbone, tmp_path: Path) -> None:
    FeatureExtractor(cache_dir=tmp_path).fit_transform(TEXTS)
    counting.identity = counting.identity | {"prompt": "another"}
    FeatureExtractor(cache_dir=tmp_path).fit_transform(TEXTS)
    assert len(counting.rows_seen) == 2 * len(TEXTS)


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        ("one text", "X is one string: expected a list of strings"),
        (["fine", ""], r"X\[1\] is ''"),
        (["fine", "  \n"], r"X\[1\] is .*: 'text' is blank"),
        (["fine", None], r"X\[1\] is None"),
        (pd.Series(["fine", np.nan]), r"X\[1\] is nan"),
        ([b"bytes"], r"X\[0\] is b'bytes'"),
        ([], "there are no texts"),
        (pd.DataFrame({"a": ["x"], "b": ["y"]}), "2 columns"),
        (np.array([["x", "y"]]), "2 columns"),
    ],
)
def test_what_is_no_text_is_refused(counting: CountingBackbone, texts: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        FeatureExtractor().fit(TEXTS).transform(texts)
    assert counting.forward_calls == 0


def test_an_extractor_must_be_fitted_and_gives_one_vector_a_text(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotFittedError):
        FeatureExtractor().transform(TEXTS)
    backbone = CountingBackbone(tokens=True)
    backbone.feature_sets = backbone.feature_sets[1:]
    monkeypatch.setattr(extractor, "_loaded", lambda *settings: backbone)
    with pytest.raises(FeatureError, match="tokens is not one vector a row: choose a pooling"):
        FeatureExtractor(pooling="tokens").fit(TEXTS)


def test_two_processes_share_one_cache(tmp_path: Path) -> None:
    code = (
        "import sys, numpy as np\n"
        "from embedcache.estimator import FeatureExtractor, extractor\n"
        "from fakes import CountingBackbone\n"
        "backbone = CountingBackbone(slow=0.01)\n"
        "extractor._loaded = lambda *settings: backbone\n"
        "texts = [f'the film was good {at}' for at in range(int(sys.argv[1]), int(sys.argv[1]) + 400)]\n"
        f"found = FeatureExtractor(cache_dir={str(tmp_path)!r}).fit_transform(texts)\n"
        "assert np.array_equal(found, [backbone.vector(text.encode()) for text in texts])\n"
        "print(len(backbone.rows_seen))"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, first], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=environment,
        )
        for first in ("0", "200")
    ]  # fmt: skip
    computed = []
    for process in started:
        out, problems = process.communicate(timeout=300)
        assert process.returncode == 0, problems
        computed.append(int(out))
    assert sum(computed) == 600, "one waits for what the other computes"


def test_a_real_model_behind_a_pipeline(tmp_path: Path) -> None:
    import tiny_models

    model = tiny_models.build("bert", tmp_path / "model")
    made = FeatureExtractor(str(model), "mean", cache_dir=tmp_path / "cache", device="cpu")
    pipeline = make_pipeline(made, LogisticRegression())
    labels = [at % 2 for at in range(len(tiny_models.TEXTS))]
    assert pipeline.fit(list(tiny_models.TEXTS), labels).predict(["not bad"]).shape == (1,)
    assert made.transform(["not bad"]).shape == (1, 22)
    assert pickle.loads(pickle.dumps(pipeline)).predict(["not bad"]).shape == (1,)


def test_a_linear_head_is_the_optimum_until_a_setting_of_minibatches_is_another() -> None:
    solvers = {
        "convex": ({}, {"l2": 3}, {"standardize": False}, {"solver": "convex", "epochs": 2}, {"early_stopping": True}),
        "minibatch": ({"epochs": 2}, {"learning_rate": 0.1}, {"solver": "minibatch"}, {"engine": "sklearn"}),
    }  # fmt: skip
    for solver, each in solvers.items():
        for asked in each:
            assert HeadClassifier(**asked).fit(X, Y).head_.training["solver"] == solver, asked
    assert HeadRegressor().fit(X, VALUES).head_.training["solver"] == "convex"
    with pytest.raises(SpecError, match="l2 is a setting of the convex solver, and epochs one of minibatches"):
        HeadClassifier(epochs=2, l2=3).fit(X, Y)
