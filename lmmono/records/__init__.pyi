from lmmono.records.sampler import Counts as Counts
from lmmono.records.units import Sample as Sample
from lmmono.records.units import sample as sample
