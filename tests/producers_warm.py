"""What the process of ``tests.producers`` that others are forked from imports."""

from tests.producers import warm_up

warm_up()
