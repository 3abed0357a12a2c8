from lmmono.reports.pages.interest import Interesting as Interesting
from lmmono.reports.pages.interest import interesting as interesting
from lmmono.reports.pages.offline import OfflineReport as OfflineReport
from lmmono.reports.pages.offline import report as report
