from .advance import advance_memory
from .balance import balance_loss, memory_statistics
from .published import published_workspace_mlp
from .workspace import GlobalWorkspace, WorkspaceMlp
