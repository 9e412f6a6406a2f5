"""Contestants for benchmarks/turns.py whose speed and memory are known. They run in processes that import this module."""

import os
import time
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Task:
    device = torch.device("cpu")
    threads = 1
    gpu_gb = None


def sleeper(task, turn, seconds=0.01):
    turn.begin()
    number = 0
    while True:
        time.sleep(seconds)
        number += 1
        turn(lambda: number)  # noqa: B023


def slow_sleeper(task, turn):
    sleeper(task, turn, seconds=0.04)


def hoarder(task, turn):
    turn.begin()
    kept = os.urandom(64 * 2**20)
    while kept:
        turn()


def liar(task, turn):
    turn()
    raise ValueError("no more steps")


def dier(task, turn):
    turn()
    os._exit(3)


def quitter(task, turn):
    turn()
    turn()
