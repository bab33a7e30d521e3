# at: tasks/mine.py
import seqio

class A:
    from tensorflow import data
# wrong: tasks/mine.py:1: imports seqio: imported when used, inside a function
# wrong: tasks/mine.py:4: imports tensorflow.data: imported when used, inside a function
