from lmmono.interop.dictionary_hub import load_from_hub as load_from_hub
from lmmono.interop.dictionary_hub import push_dictionary as push_dictionary
from lmmono.interop.interchange import export_dictionary as export_dictionary
from lmmono.interop.interchange import import_dictionary as import_dictionary
from lmmono.interop.lens import to_hooked as to_hooked
from lmmono.interop.lens import token_losses as token_losses
from lmmono.interop.neuronpedia import export_neuronpedia as export_neuronpedia
from lmmono.interop.openai_results import export_simulations as export_simulations
