from lmmono.data import planted as planted
from lmmono.data import tasks as tasks
from lmmono.data.sources import tokenize as tokenize
from lmmono.data.tokens import TokenCorpus as TokenCorpus
from lmmono.data.tokens import TokenRows as TokenRows
from lmmono.data.tokens import prepare as prepare
