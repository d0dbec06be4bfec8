# SPDX-License-Identifier: Apache-2.0
"""What the commands of benchmarks/ share.

    figures   medians, spread, ratios: all arithmetic, no I/O
    report    how figures are written down
    cpu       CPU time of processes, and which cores they may use
    tools     the C programs beside this package: built, started, read
    apache    a private httpd
    callgrind instructions of one request
    machine   what the report says about where it was made

A command is a module here with a `main`, and a file of its name one level up that calls it.
"""
