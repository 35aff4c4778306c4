"""`clipkit check`: whether all ranks train as one process would, how fast, and in what memory."""

HELP = """\
usage: clipkit check -c base -c RECIPE [OPTIONS OF fit]

Two minutes of what `clipkit fit` would run, on this machine, with its data and all
its ranks; nothing is written but caches that are asked for. One page says:

  gradients   those of all ranks, in float64, against one process that has the whole
              batch at once; dropout and batch statistics are held still
  speed       pairs a second, waiting for data, how long the run will take
  memory      its peak, and the largest micro-batch that fits
  captions    the share that is cut to the context, or repeated within a batch

Where pictures change their size, the largest are measured. Exit code 0 where the
gradients agree, 1 where they differ, 2 on a mistake, 70 where it fails itself.
The options are those of fit; clipkit fit --help lists them.

example: clipkit check -c base -c pairs --data.dataset ~/my_pictures --trainer.devices 2
"""
