"""Campaigns: what nobody thought of, tried at random, with a number for each case so that it can be made again.

    make campaigns                                                   # an hour on two cores at most, one table
    python -m tests.campaigns --only faults --seed 20261129 --case 17    # one case again

A campaign is a function of one case's random numbers. It counts what it tried, and raises where something survived that
must not. `tests/campaigns/test_campaigns.py` runs a few cases of each with every `make test`, other ones each day.
"""
