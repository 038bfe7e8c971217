"""Tools around bandwidth: links between a run's ranks, NCCL Inspector's files, and the page that shows a run.

In: a launched world (`links`), or files of a run or of NCCL. Out: tables, a links file for the planner, an HTML page.
Nothing here takes part in training.
"""
