from .advance import advance_memory
from .balance import balance_loss, memory_statistics
from .published import convert_published_workspace, published_workspace_mlp
from .question import QuestionEmbed
from .workspace import GlobalWorkspace, WorkspaceMlp
