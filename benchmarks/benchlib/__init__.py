# SPDX-License-Identifier: Apache-2.0
"""What the commands of benchmarks/ share.

    figures   medians, spread, ratios: all arithmetic, no I/O
    report    how figures are written down
    plot      charts
    cpu       CPU time of processes, and which cores they may use
    tools     the C programs beside this package: built, started, read
    apache    a private httpd
    callgrind instructions of one request
    machine   what the report says about where it was made

Of benchmarks/run, the scenarios and what is made of them:

    suite     the command: rounds that are kept, progress, what is missing
    parts     the table of scenarios; here one is added
    point     climbs: streams level by level, and a look at each; point_report writes them down
    door      the contenders of the point; publisher is who tells Pushpin what to send
    beyond    streams beyond one process's descriptors
    loadgen   the generators: by hand, and their ceiling
    profile   flame graphs
    summary   the report as a whole
    publish   docs/performance.md from a run that is kept

A command is a module here with a `main`, and a file of its name one level up that calls it.
"""
