"""What trained models can do, as reports, and what the runs of a study show (compare.py).

`experiments.evaluate` runs one task and shows it.

A task is a line of TASKS (tasks.py), and a module of the same name with two functions:

    run(loaded, mesh, options) -> report      measures; the report is a dict of JSON values
    draw(report) -> Figure | None             with yocou_jax.plots, which it imports inside

`loaded` is a `Pretrained`, with its parameters on `mesh`. `options` is an `Options` (options.py);
TASKS says which of its fields a task reads, and `evaluate` refuses the others. `run` is called
inside `jax.set_mesh(mesh)`, prints nothing, and raises UserError for what the user can correct. To
run another number of loops than in training, it calls `models(loaded, options)`. A report has:

    "loops"     list of int: the loop counts that were measured; [] for a program without a loop
    "scalars"   {name: number}: TensorBoard shows them as evaluation/TASK/name
    "tables"    {title: [{column: number, text or truth}, ...]}: shown on the terminal; all rows of
                a table have the same columns. A column "stderr" is the standard error of the number
                to its left, with the sequences (or the samples) as independent observations.
    "length", "packing"   if the task has one length and reads text: they decide which attention
                          kernel runs
    more facts, such as how many tokens were read; they are written to the file only

`evaluate` (results.py) adds what is true of every task (program, step, dtype, kernel, versions,
device, command), and `write` writes WORKDIR/evaluation/TASK.json, TASK.png, and TensorBoard events.
"""
