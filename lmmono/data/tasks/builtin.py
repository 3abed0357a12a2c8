"""The built-in tasks that are read from files or the hub; adding one is adding an entry.

Licences are those that the sources state; where one states none, that is what is said.
"""

from lmmono.data.tasks.comments import COMMENTS
from lmmono.data.tasks.inference import INFERENCE
from lmmono.data.tasks.sentiment import SENTIMENT
from lmmono.data.tasks.task_registry import RECORDS
from lmmono.data.tasks.topics import TOPICS

for record in (*SENTIMENT, *TOPICS, *COMMENTS, *INFERENCE):
    assert record.name not in RECORDS, record.name
    RECORDS[record.name] = record
