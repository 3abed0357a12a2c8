from lmmono.data.tasks.overlap import leakage as leakage
from lmmono.data.tasks.planted_tasks import planted_task as planted_task
from lmmono.data.tasks.reading import find_task as find_task
from lmmono.data.tasks.reading import read_task as read_task
from lmmono.data.tasks.task import Labelled as Labelled
from lmmono.data.tasks.task import Task as Task
from lmmono.registry.tasks import TASK_NAMES as TASK_NAMES
