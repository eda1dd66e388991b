"""Campaigns: random trials of unforeseen inputs, with a number for each case so that it can be repeated.

    make campaigns                                                   # an hour on two cores at most, one table
    python -m tests.campaigns --only faults --seed 20261129 --case 17    # repeats one case

A campaign is a function of one case's random numbers. It counts its trials, and raises if a defect shows. With every
`make test`, `tests/campaigns/test_campaigns.py` runs a few cases of each, different ones each day.
"""
