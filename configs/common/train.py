"""Keys of every detection run: output, starting weights, length, device, precision, periods."""

train = dict(
    # Folder of checkpoints, metrics.json, log.txt, TensorBoard events, config.yaml and evaluations.
    output_dir="./output",
    # Weights to start from: teacher_backbone.pth of a pre-training run, a detector's checkpoint,
    # a published FLSL file; path or URL. "" starts from random weights.
    init_checkpoint="",
    # Number of steps; schedules are given in fractions of it.
    max_iter=90000,
    # "cuda" or "cpu".
    device="cuda",
    # Seed of weights, order of images and augmentation; negative: a new one for each run.
    seed=-1,
    # Mixed precision on GPUs ("float16" or "bfloat16"); a CPU trains in float32. With evaluation,
    # test sets are evaluated in it as well: faster, with slightly other scores.
    amp=dict(enabled=True, dtype="float16", evaluation=False),
    # Options of DistributedDataParallel, used with several processes.
    ddp=dict(
        broadcast_buffers=False,
        find_unused_parameters=False,
        # Whether gradients are sent between GPUs in float16; only used with amp.dtype=float16,
        # whose gradients are scaled up.
        fp16_compression=True,
    ),
    # Steps between two checkpoints, and the number of newest ones that are kept.
    checkpointer=dict(period=5000, max_to_keep=3),
    # Steps between two evaluations; there is always one after the last step.
    eval_period=5000,
    # Value of the evaluation, such as "bbox/AP", whose best weights are kept as model_best.pth;
    # "" keeps none.
    best_metric="",
    # Evaluations in a row without a better best_metric after which training stops; 0 never stops.
    patience=0,
    # Steps between two lines on the console and in metrics.json.
    log_period=20,
    # Trackers beside TensorBoard: a list of "wandb" and "mlflow".
    trackers=[],
)
