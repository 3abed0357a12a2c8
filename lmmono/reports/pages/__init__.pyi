from lmmono.reports.pages.interest import Interesting as Interesting
from lmmono.reports.pages.interest import interesting as interesting
from lmmono.reports.pages.offline import Report as Report
from lmmono.reports.pages.offline import report as report
