"""``summary.json``: everything a sweep found, in one file; with ``results.jsonl`` it is all that a report reads.

Strict JSON: no NaN, a number that does not exist is null. *score* always means the sweep's metric, in its own direction
(``metric.greater_is_better``). Splits are called by the cache's own names; *development rows* are all rows of train and
validation, in the order of the cache. Keys of version 1 stay; new ones may be added::

    format, version      "embedcache-sweep", 1
    complete             false while the sweep runs and after it was interrupted: what follows is then a part
    task                 "classification" | "multilabel" | "regression"
    class_names          [str]; the names of the targets for regression
    metric               {name, greater_is_better}
    baseline             the best score of a majority head among those tried: float | null
    data                 {name: the cache folder's name, model: str|null, rows: {split: int}, development_rows,
                         unique_rows, feature_sets: [{name, kind: "pooled"|"layers"|"tokens", dim, layers}],
                         classes: {class: {split: rows}} | null}
    protocol             {kind: "folds"|"split"|"shots", folds, repeats, shots|null, draws|null, seed,
                         stopping_share, alpha, text: one sentence for people}
    leaderboard          [row], best score first. A row is one candidate: a configuration whatever its seed, for seeds
                         are repetitions and nobody may choose the lucky one.
      rank, id, label    1..; 16 hex digits; one line for people such as "linear lr=0.003 wd=0.01 · mean"
      feature            name of the feature set, such as "l2:mean@-2"
      pooling, layers, normalize     the same in parts: "mean", "-2", true; layers is "all", "-1" or "1+3"
      head               {kind, engine, options}
      train              {every field of TrainSpec except seed} ; only those that this kind of head reads
      varied             {name: value}, the settings that differ within the sweep, head options as "hidden"; for plots
                         of score against a hyper-parameter. Values are numbers, strings, booleans, null or lists.
      seeds              [int]
      score, sd          mean over folds of the mean over seeds; standard deviation over folds (null for one)
      interval           [low, high] at 1 - alpha for the score; interval_method says how: "nadeau-bengio" (corrected
                         resampled t) or "bootstrap" (over rows)
      fold_scores        [float], one a fold, mean over seeds
      difference         {value, interval: [low, high]}: this score less the winner's, paired on the same rows; the
                         winner's own is 0 and [0, 0]
      p, p_adjusted      paired test against the winner, and with Holm's correction; null for the winner
      p_folds            the same by the corrected resampled t over folds, for comparison; null when there is none
      test_method        "mcnemar-exact" | "paired-bootstrap" | null for the winner
      distinguishable    false: the data cannot tell it from the winner (always false for the winner)
      parameters         numbers in the trained head (for kNN the rows it keeps)
      seconds            of training, all folds and seeds; a head's share of the stack it was trained in
      epochs             mean epochs that were run; null where there are none
      looked_at_test     whether the test split was ever used for it
      test               {score, interval, rows} | null
    failures             [{id, label, error}] configurations that could not be trained; not in the leaderboard
    chosen               {id, label, why}; the winner, or the simplest of those not distinguishable from it with
                         --choose simplest. best/ holds it.
    recommended          {id, label, why}; the simplest of those not distinguishable from the winner
    test                 the chosen head on the test split, trained on the development rows; null without a test split
      id, label, split, rows, score, interval, interval_method ("bootstrap"), trained_on: rows
      metrics            what train.measure gives (scalars of every metric, and more)
      confusion          classification: {labels, matrix: [[rows]] with truth down and prediction across,
                         normalized: the same with each true row summing to 1}; else null
      per_class          [{class, rows, precision, recall, f1}]; regression: [{target, rows, mae, rmse, r2}]
      calibration        {ece, bins: [{low, high, confidence|null, accuracy|null, rows}]}; confidence is of the
                         predicted class (multilabel: the probability of a label, and accuracy how often it holds);
                         null for regression
      points             regression: {target: [[true, predicted], ...]} at most 2,000 rows; else null
    mistakes             {split, rows: how many mistakes there are, shown: [mistake]}, the most confident first, at
                         most 50; on the test split, or out of fold on the development rows where there is none
      row, id            the row's number in the cache and its id
      true, predicted    names; lists of names (multilabel); numbers per target (regression)
      probability        of the predicted class (multilabel: of the most wrongly decided label); null for regression
      error              regression: the largest absolute error over targets in units of that target's spread; else null
      text, image        the row's content where the cache kept its inputs: text (at most 2,000 characters), or a data:
                         URI of a picture of at most 96 x 96; else null
    learning_curve       [{id, label, points: [{rows: training rows, score, sd, interval, scores}]}]; [] if not asked
    few_shot             {shots, draws, scores: of the chosen head on test, one a draw, score, sd} | null
    ran                  {command: str|null, versions: {package: version}, cache_spec: hash, dataset: hash,
                         sweep: hash of sweep.json's identity, configurations, fits, started, finished: ISO 8601 UTC,
                         seconds, machine: {platform, cpus, threads}}
    notes                [str] for people

``results.jsonl`` has one line for each configuration and fold::

    id           the configuration with its seed: 16 hex digits
    candidate    the leaderboard's id
    fold         0..; counts through repeats and draws
    repeat       which repeat or draw
    train_rows   rows it learnt from, and eval_rows, rows it was scored on
    score        float | null
    metrics      {name: float|null} scalars on the fold
    feature, head, train    as above, train with its seed
    parameters, seconds, epochs
    curve        null, or the number of training rows where the line is a point of a learning curve
    error        null, or why it could not be trained
"""
