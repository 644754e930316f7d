"""The part of tensorrt-stubs (MIT licence, sync.dev) that we use; made by tests/engines/tensorrt_api.py."""

from typing import Any, ClassVar

__version__: str

def nptype(trt_type: DataType) -> Any: ...
def init_libnvinfer_plugins(logger: Any, namespace: str) -> bool: ...

class Builder:
    error_recorder: Any
    max_threads: int

    def __init__(self, logger: ILogger) -> None:
        ...

    def build_engine_with_config(self, network: INetworkDefinition, config: IBuilderConfig) -> ICudaEngine:
        ...

    def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> IHostMemory:
        ...

    def build_serialized_network_to_stream(self, network: INetworkDefinition, config: IBuilderConfig, writer: Any) -> bool:
        ...

    def create_builder_config(self) -> IBuilderConfig:
        ...

    def create_network(self, flags: int=...) -> INetworkDefinition:
        ...

    def create_optimization_profile(self) -> IOptimizationProfile:
        ...

    def get_plugin_registry(self) -> Any:
        ...

    def is_network_supported(self, network: INetworkDefinition, config: IBuilderConfig) -> bool:
        ...

    def reset(self) -> None:
        ...

    @property
    def logger(self) -> ILogger:
        ...

    @property
    def max_DLA_batch_size(self) -> int:
        ...

    @property
    def num_DLA_cores(self) -> int:
        ...

    @property
    def platform_has_fast_fp16(self) -> bool:
        ...

    @property
    def platform_has_fast_int8(self) -> bool:
        ...

    @property
    def platform_has_tf32(self) -> bool:
        ...

class BuilderFlag:
    BF16: ClassVar[BuilderFlag]
    DEBUG: ClassVar[BuilderFlag]
    DIRECT_IO: ClassVar[BuilderFlag]
    DISABLE_COMPILATION_CACHE: ClassVar[BuilderFlag]
    DISABLE_TIMING_CACHE: ClassVar[BuilderFlag]
    DISTRIBUTIVE_INDEPENDENCE: ClassVar[BuilderFlag]
    EDITABLE_TIMING_CACHE: ClassVar[BuilderFlag]
    ERROR_ON_TIMING_CACHE_MISS: ClassVar[BuilderFlag]
    EXCLUDE_LEAN_RUNTIME: ClassVar[BuilderFlag]
    FP16: ClassVar[BuilderFlag]
    FP4: ClassVar[BuilderFlag]
    FP8: ClassVar[BuilderFlag]
    GPU_FALLBACK: ClassVar[BuilderFlag]
    INT4: ClassVar[BuilderFlag]
    INT8: ClassVar[BuilderFlag]
    MONITOR_MEMORY: ClassVar[BuilderFlag]
    OBEY_PRECISION_CONSTRAINTS: ClassVar[BuilderFlag]
    PREFER_PRECISION_CONSTRAINTS: ClassVar[BuilderFlag]
    REFIT: ClassVar[BuilderFlag]
    REFIT_IDENTICAL: ClassVar[BuilderFlag]
    REFIT_INDIVIDUAL: ClassVar[BuilderFlag]
    REJECT_EMPTY_ALGORITHMS: ClassVar[BuilderFlag]
    SAFETY_SCOPE: ClassVar[BuilderFlag]
    SPARSE_WEIGHTS: ClassVar[BuilderFlag]
    STRICT_NANS: ClassVar[BuilderFlag]
    STRIP_PLAN: ClassVar[BuilderFlag]
    TF32: ClassVar[BuilderFlag]
    VERSION_COMPATIBLE: ClassVar[BuilderFlag]
    WEIGHTLESS: ClassVar[BuilderFlag]
    WEIGHT_STREAMING: ClassVar[BuilderFlag]
    __members__: ClassVar[dict[str, BuilderFlag]]

    def __init__(self, value: int) -> None:
        ...

    def __int__(self) -> int:
        ...

    @property
    def name(self) -> str:
        ...

    @property
    def value(self) -> int:
        ...

class CalibrationAlgoType:
    ENTROPY_CALIBRATION: ClassVar[CalibrationAlgoType]
    ENTROPY_CALIBRATION_2: ClassVar[CalibrationAlgoType]
    LEGACY_CALIBRATION: ClassVar[CalibrationAlgoType]
    MINMAX_CALIBRATION: ClassVar[CalibrationAlgoType]
    __members__: ClassVar[dict[str, CalibrationAlgoType]]

    def __init__(self, value: int) -> None:
        ...

    def __int__(self) -> int:
        ...

    @property
    def name(self) -> str:
        ...

    @property
    def value(self) -> int:
        ...

class DataType:
    BF16: ClassVar[DataType]
    BOOL: ClassVar[DataType]
    E8M0: ClassVar[DataType]
    FLOAT: ClassVar[DataType]
    FP4: ClassVar[DataType]
    FP8: ClassVar[DataType]
    HALF: ClassVar[DataType]
    INT32: ClassVar[DataType]
    INT4: ClassVar[DataType]
    INT64: ClassVar[DataType]
    INT8: ClassVar[DataType]
    UINT8: ClassVar[DataType]
    __members__: ClassVar[dict[str, DataType]]

    def __init__(self, value: int) -> None:
        ...

    def __int__(self) -> int:
        ...

    @property
    def itemsize(self) -> Any:
        ...

    @property
    def name(self) -> str:
        ...

    @property
    def value(self) -> int:
        ...

class Dims:
    MAX_DIMS: ClassVar[int]

    def __getitem__(self, arg0: int) -> int:
        ...

    def __init__(self) -> None:
        ...

    def __len__(self) -> int:
        ...

class EngineInspector:
    error_recorder: Any
    execution_context: IExecutionContext

    def get_engine_information(self, format: LayerInformationFormat) -> str:
        ...

    def get_layer_information(self, layer_index: int, format: LayerInformationFormat) -> str:
        ...

class HardwareCompatibilityLevel:
    AMPERE_PLUS: ClassVar[HardwareCompatibilityLevel]
    NONE: ClassVar[HardwareCompatibilityLevel]
    SAME_COMPUTE_CAPABILITY: ClassVar[HardwareCompatibilityLevel]
    __members__: ClassVar[dict[str, HardwareCompatibilityLevel]]

    def __init__(self, value: int) -> None:
        ...

    def __int__(self) -> int:
        ...

    @property
    def name(self) -> str:
        ...

    @property
    def value(self) -> int:
        ...

class IBuilderConfig:
    DLA_core: int
    algorithm_selector: Any
    avg_timing_iterations: int
    builder_optimization_level: int
    default_device_type: Any
    engine_capability: Any
    flags: int
    hardware_compatibility_level: HardwareCompatibilityLevel
    int8_calibrator: IInt8Calibrator
    l2_limit_for_tiling: int
    max_aux_streams: int
    max_num_tactics: int
    plugins_to_serialize: list[str]
    profile_stream: int
    profiling_verbosity: ProfilingVerbosity
    progress_monitor: IProgressMonitor
    quantization_flags: int
    remote_auto_tuning_config: str
    runtime_platform: Any
    tiling_optimization_level: TilingOptimizationLevel

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        ...

    def can_run_on_DLA(self, layer: Any) -> bool:
        ...

    def clear_flag(self, flag: BuilderFlag) -> None:
        ...

    def clear_quantization_flag(self, flag: Any) -> None:
        ...

    def create_timing_cache(self, serialized_timing_cache: Any) -> ITimingCache:
        ...

    def get_calibration_profile(self) -> IOptimizationProfile:
        ...

    def get_device_type(self, layer: Any) -> Any:
        ...

    def get_flag(self, flag: BuilderFlag) -> bool:
        ...

    def get_memory_pool_limit(self, pool: MemoryPoolType) -> int:
        ...

    def get_preview_feature(self, feature: Any) -> bool:
        ...

    def get_quantization_flag(self, flag: Any) -> bool:
        ...

    def get_tactic_sources(self) -> int:
        ...

    def get_timing_cache(self) -> ITimingCache:
        ...

    def is_device_type_set(self, layer: Any) -> bool:
        ...

    def reset(self) -> None:
        ...

    def reset_device_type(self, layer: Any) -> None:
        ...

    def set_calibration_profile(self, profile: IOptimizationProfile) -> bool:
        ...

    def set_device_type(self, layer: Any, device_type: Any) -> None:
        ...

    def set_flag(self, flag: BuilderFlag) -> None:
        ...

    def set_memory_pool_limit(self, pool: MemoryPoolType, pool_size: int) -> None:
        ...

    def set_preview_feature(self, feature: Any, enable: bool) -> None:
        ...

    def set_quantization_flag(self, flag: Any) -> None:
        ...

    def set_tactic_sources(self, tactic_sources: int) -> bool:
        ...

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        ...

    @property
    def num_optimization_profiles(self) -> int:
        ...

class ICudaEngine:
    error_recorder: Any
    weight_streaming_budget: int
    weight_streaming_budget_v2: int

    def __getitem__(self, arg0: int) -> str:
        ...

    def create_engine_inspector(self) -> EngineInspector:
        ...

    def create_execution_context(self, strategy: Any=...) -> IExecutionContext:
        ...

    def create_execution_context_without_device_memory(self) -> IExecutionContext:
        ...

    def create_runtime_config(self) -> Any:
        ...

    def create_serialization_config(self) -> Any:
        ...

    def get_device_memory_size_for_profile(self, profile_index: int) -> int:
        ...

    def get_device_memory_size_for_profile_v2(self, profile_index: int) -> int:
        ...

    def get_tensor_bytes_per_component(self, name: str) -> int:
        ...

    def get_tensor_components_per_element(self, name: str) -> int:
        ...

    def get_tensor_dtype(self, name: str) -> DataType:
        ...

    def get_tensor_format(self, name: str) -> Any:
        ...

    def get_tensor_format_desc(self, name: str) -> str:
        ...

    def get_tensor_location(self, name: str) -> Any:
        ...

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        ...

    def get_tensor_name(self, index: int) -> str:
        ...

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[Dims]:
        ...

    def get_tensor_profile_values(self, name: int, profile_index: str) -> list[list[int]]:
        ...

    def get_tensor_shape(self, name: str) -> Dims:
        ...

    def get_tensor_vectorized_dim(self, name: str) -> int:
        ...

    def get_weight_streaming_automatic_budget(self) -> int:
        ...

    def is_debug_tensor(self, name: str) -> bool:
        ...

    def is_shape_inference_io(self, name: str) -> bool:
        ...

    def serialize(self) -> IHostMemory:
        ...

    def serialize_with_config(self, arg0: Any) -> IHostMemory:
        ...

    @property
    def device_memory_size(self) -> int:
        ...

    @property
    def device_memory_size_v2(self) -> int:
        ...

    @property
    def engine_capability(self) -> Any:
        ...

    @property
    def hardware_compatibility_level(self) -> Any:
        ...

    @property
    def has_implicit_batch_dimension(self) -> bool:
        ...

    @property
    def minimum_weight_streaming_budget(self) -> int:
        ...

    @property
    def name(self) -> str:
        ...

    @property
    def num_aux_streams(self) -> int:
        ...

    @property
    def num_io_tensors(self) -> int:
        ...

    @property
    def num_layers(self) -> int:
        ...

    @property
    def num_optimization_profiles(self) -> int:
        ...

    @property
    def profiling_verbosity(self) -> Any:
        ...

    @property
    def refittable(self) -> bool:
        ...

    @property
    def streamable_weights_size(self) -> int:
        ...

    @property
    def tactic_sources(self) -> int:
        ...

    @property
    def weight_streaming_scratch_memory_size(self) -> int:
        ...

class IExecutionContext:
    debug_sync: bool
    enqueue_emits_profile: bool
    error_recorder: Any
    name: str
    nvtx_verbosity: Any
    persistent_cache_limit: int
    profiler: Any
    temporary_allocator: Any
    unfused_tensors_debug_state: bool

    def execute_async_v3(self, stream_handle: int) -> bool:
        ...

    def execute_v2(self, bindings: list[int]) -> bool:
        ...

    def get_debug_listener(self) -> Any:
        ...

    def get_debug_state(self, name: str) -> bool:
        ...

    def get_input_consumed_event(self) -> int:
        ...

    def get_max_output_size(self, name: str) -> int:
        ...

    def get_output_allocator(self, name: str) -> Any:
        ...

    def get_runtime_config(self) -> Any:
        ...

    def get_tensor_address(self, name: str) -> int:
        ...

    def get_tensor_shape(self, name: str) -> Dims:
        ...

    def get_tensor_strides(self, name: str) -> Dims:
        ...

    def infer_shapes(self) -> list[str]:
        ...

    def report_to_profiler(self) -> bool:
        ...

    def set_all_tensors_debug_state(self, flag: bool) -> bool:
        ...

    def set_aux_streams(self, aux_streams: list[int]) -> None:
        ...

    def set_debug_listener(self, listener: Any) -> bool:
        ...

    def set_device_memory(self, memory: int, size: int) -> None:
        ...

    def set_input_consumed_event(self, event: int) -> bool:
        ...

    def set_input_shape(self, name: str, shape: Any) -> bool:
        ...

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        ...

    def set_output_allocator(self, name: str, output_allocator: Any) -> bool:
        ...

    def set_tensor_address(self, name: str, memory: int) -> bool:
        ...

    def set_tensor_debug_state(self, name: str, flag: bool) -> bool:
        ...

    def update_device_memory_size_for_shapes(self) -> int:
        ...

    @property
    def active_optimization_profile(self) -> int:
        ...

    @property
    def all_binding_shapes_specified(self) -> bool:
        ...

    @property
    def all_shape_inputs_specified(self) -> bool:
        ...

    @property
    def engine(self) -> Any:
        ...

class IHostMemory:

    def __buffer__(self, flags: Any) -> Any:
        ...

    @property
    def dtype(self) -> DataType:
        ...

    @property
    def nbytes(self) -> int:
        ...

class IInt8Calibrator:

    def __init__(self) -> None:
        ...

    def get_algorithm(self) -> CalibrationAlgoType:
        ...

    def get_batch(self, names: list[str]) -> list[int]:
        ...

    def get_batch_size(self) -> int:
        ...

    def read_calibration_cache(self) -> Any:
        ...

    def write_calibration_cache(self, cache: Any) -> None:
        ...

class IInt8EntropyCalibrator2(IInt8Calibrator):

    def __init__(self) -> None:
        ...

    def get_algorithm(self) -> CalibrationAlgoType:
        ...

    def get_batch(self, names: list[str]) -> list[int]:
        ...

    def get_batch_size(self) -> int:
        ...

    def read_calibration_cache(self) -> Any:
        ...

    def write_calibration_cache(self, cache: Any) -> None:
        ...

class IInt8MinMaxCalibrator(IInt8Calibrator):

    def __init__(self) -> None:
        ...

    def get_algorithm(self) -> CalibrationAlgoType:
        ...

    def get_batch(self, names: list[str]) -> list[int]:
        ...

    def get_batch_size(self) -> int:
        ...

    def read_calibration_cache(self) -> Any:
        ...

    def write_calibration_cache(self, cache: Any) -> None:
        ...

class ILogger:

    class Severity:
        ERROR: ClassVar[Any]
        INFO: ClassVar[Any]
        INTERNAL_ERROR: ClassVar[Any]
        VERBOSE: ClassVar[Any]
        WARNING: ClassVar[Any]
        __members__: ClassVar[dict[str, Any]]

        def __init__(self, value: int) -> None:
            ...

        def __int__(self) -> int:
            ...

        @property
        def name(self) -> str:
            ...

        @property
        def value(self) -> int:
            ...
    ERROR: ClassVar[Any]
    INFO: ClassVar[Any]
    INTERNAL_ERROR: ClassVar[Any]
    VERBOSE: ClassVar[Any]
    WARNING: ClassVar[Any]

    def __init__(self) -> None:
        ...

    def log(self, severity: Any, msg: str) -> None:
        ...

class INetworkDefinition:
    error_recorder: Any
    name: str

    def __getitem__(self, arg0: int) -> Any:
        ...

    def __len__(self) -> int:
        ...

    def add_activation(self, input: ITensor, type: Any) -> Any:
        ...

    def add_assertion(self, condition: ITensor, message: str) -> Any:
        ...

    def add_cast(self, input: ITensor, to_type: DataType) -> Any:
        ...

    def add_concatenation(self, inputs: list[ITensor]) -> Any:
        ...

    def add_constant(self, shape: Dims, weights: Any) -> Any:
        ...

    def add_convolution_nd(self, input: ITensor, num_output_maps: int, kernel_shape: Dims, kernel: Any, bias: Any=...) -> Any:
        ...

    def add_cumulative(self, input: ITensor, axis: ITensor, op: Any, exclusive: bool, reverse: bool) -> Any:
        ...

    def add_deconvolution_nd(self, input: ITensor, num_output_maps: int, kernel_shape: Dims, kernel: Any, bias: Any=...) -> Any:
        ...

    def add_dequantize(self, input: ITensor, scale: ITensor) -> Any:
        ...

    def add_dynamic_quantize(self, input: ITensor, axis: int, block_size: int, output_type: DataType, scale_type: DataType) -> Any:
        ...

    def add_einsum(self, inputs: list[ITensor], equation: str) -> Any:
        ...

    def add_elementwise(self, input1: ITensor, input2: ITensor, op: Any) -> Any:
        ...

    def add_fill(self, shape: Dims, op: Any, output_type: DataType) -> Any:
        ...

    def add_gather(self, input: ITensor, indices: ITensor, axis: int) -> Any:
        ...

    def add_gather_v2(self, input: ITensor, indices: ITensor, mode: Any) -> Any:
        ...

    def add_grid_sample(self, input: ITensor, grid: ITensor) -> Any:
        ...

    def add_identity(self, input: ITensor) -> Any:
        ...

    def add_if_conditional(self) -> Any:
        ...

    def add_input(self, name: str, dtype: DataType, shape: Dims) -> ITensor:
        ...

    def add_loop(self) -> Any:
        ...

    def add_lrn(self, input: ITensor, window: int, alpha: float, beta: float, k: float) -> Any:
        ...

    def add_matrix_multiply(self, input0: ITensor, op0: Any, input1: ITensor, op1: Any) -> Any:
        ...

    def add_nms(self, boxes: ITensor, scores: ITensor, max_output_boxes_per_class: ITensor) -> Any:
        ...

    def add_non_zero(self, input: ITensor) -> Any:
        ...

    def add_normalization(self, input: ITensor, scale: ITensor, bias: ITensor, axesMask: int) -> Any:
        ...

    def add_one_hot(self, indices: ITensor, values: ITensor, depth: ITensor, axis: int) -> Any:
        ...

    def add_padding_nd(self, input: ITensor, pre_padding: Dims, post_padding: Dims) -> Any:
        ...

    def add_parametric_relu(self, input: ITensor, slopes: ITensor) -> Any:
        ...

    def add_plugin(self, tuple: Any) -> Any:
        ...

    def add_plugin_v2(self, inputs: list[ITensor], plugin: Any) -> Any:
        ...

    def add_plugin_v3(self, inputs: list[ITensor], shape_inputs: list[ITensor], plugin: Any) -> Any:
        ...

    def add_pooling_nd(self, input: ITensor, type: Any, window_size: Dims) -> Any:
        ...

    def add_quantize(self, input: ITensor, scale: ITensor) -> Any:
        ...

    def add_ragged_softmax(self, input: ITensor, bounds: ITensor) -> Any:
        ...

    def add_reduce(self, input: ITensor, op: Any, axes: int, keep_dims: bool) -> Any:
        ...

    def add_resize(self, input: ITensor) -> Any:
        ...

    def add_reverse_sequence(self, input: ITensor, sequence_lens: ITensor) -> Any:
        ...

    def add_scale(self, input: ITensor, mode: Any, shift: Any=..., scale: Any=..., power: Any=...) -> Any:
        ...

    def add_scale_nd(self, input: ITensor, mode: Any, shift: Any=..., scale: Any=..., power: Any=..., channel_axis: int=...) -> Any:
        ...

    def add_scatter(self, data: ITensor, indices: ITensor, updates: ITensor, mode: Any) -> Any:
        ...

    def add_select(self, condition: ITensor, then_input: ITensor, else_input: ITensor) -> Any:
        ...

    def add_shape(self, input: ITensor) -> Any:
        ...

    def add_shuffle(self, input: ITensor) -> Any:
        ...

    def add_slice(self, input: ITensor, start: Dims, shape: Dims, stride: Dims) -> Any:
        ...

    def add_softmax(self, input: ITensor) -> Any:
        ...

    def add_squeeze(self, input: ITensor, axes: ITensor) -> Any:
        ...

    def add_topk(self, input: ITensor, op: Any, k: int, axes: int) -> Any:
        ...

    def add_unary(self, input: ITensor, op: Any) -> Any:
        ...

    def add_unsqueeze(self, input: ITensor, axes: ITensor) -> Any:
        ...

    def are_weights_marked_refittable(self, name: str) -> bool:
        ...

    def get_flag(self, flag: Any) -> bool:
        ...

    def get_input(self, index: int) -> ITensor:
        ...

    def get_layer(self, index: int) -> Any:
        ...

    def get_output(self, index: int) -> ITensor:
        ...

    def is_debug_tensor(self, tensor: ITensor) -> bool:
        ...

    def mark_debug(self, tensor: ITensor) -> bool:
        ...

    def mark_output(self, tensor: ITensor) -> None:
        ...

    def mark_output_for_shapes(self, tensor: ITensor) -> bool:
        ...

    def mark_unfused_tensors_as_debug_tensors(self) -> bool:
        ...

    def mark_weights_refittable(self, name: str) -> bool:
        ...

    def remove_tensor(self, tensor: ITensor) -> None:
        ...

    def set_weights_name(self, weights: Any, name: str) -> bool:
        ...

    def unmark_debug(self, tensor: ITensor) -> bool:
        ...

    def unmark_output(self, tensor: ITensor) -> None:
        ...

    def unmark_output_for_shapes(self, tensor: ITensor) -> bool:
        ...

    def unmark_unfused_tensors_as_debug_tensors(self) -> bool:
        ...

    def unmark_weights_refittable(self, name: str) -> bool:
        ...

    @property
    def builder(self) -> Any:
        ...

    @property
    def flags(self) -> int:
        ...

    @property
    def has_implicit_batch_dimension(self) -> bool:
        ...

    @property
    def num_inputs(self) -> int:
        ...

    @property
    def num_layers(self) -> int:
        ...

    @property
    def num_outputs(self) -> int:
        ...

class IOptimizationProfile:
    extra_memory_target: float

    def __bool__(self) -> bool:
        ...

    def get_shape(self, input: str) -> list[Dims]:
        ...

    def get_shape_input(self, input: str) -> list[list[int]]:
        ...

    def set_shape(self, input: str, min: Dims, opt: Dims, max: Dims) -> None:
        ...

    def set_shape_input(self, input: str, min: list[int], opt: list[int], max: list[int]) -> None:
        ...

class IProgressMonitor:

    def __init__(self) -> None:
        ...

    def phase_finish(self, phase_name: str) -> None:
        ...

    def phase_start(self, phase_name: str, parent_phase: str, num_steps: int) -> None:
        ...

    def step_complete(self, phase_name: str, step: int) -> bool:
        ...

class ITensor:
    allowed_formats: int
    broadcast_across_batch: bool
    dtype: DataType
    location: Any
    name: str
    shape: Dims

    def get_dimension_name(self, index: int) -> str:
        ...

    def reset_dynamic_range(self) -> None:
        ...

    def set_dimension_name(self, index: int, name: str) -> None:
        ...

    def set_dynamic_range(self, min: float, max: float) -> bool:
        ...

    @property
    def dynamic_range(self) -> Any:
        ...

    @dynamic_range.setter
    def dynamic_range(self, arg1: list[float]) -> None:
        ...

    @property
    def is_execution_tensor(self) -> bool:
        ...

    @property
    def is_network_input(self) -> bool:
        ...

    @property
    def is_network_output(self) -> bool:
        ...

    @property
    def is_shape_tensor(self) -> bool:
        ...

class ITimingCache:

    def combine(self, input_cache: ITimingCache, ignore_mismatch: bool) -> bool:
        ...

    def query(self, key: Any) -> Any:
        ...

    def queryKeys(self) -> list[Any]:
        ...

    def reset(self) -> bool:
        ...

    def serialize(self) -> IHostMemory:
        ...

    def update(self, key: Any, value: Any) -> bool:
        ...

class LayerInformationFormat:
    JSON: ClassVar[LayerInformationFormat]
    ONELINE: ClassVar[LayerInformationFormat]
    __members__: ClassVar[dict[str, LayerInformationFormat]]

    def __init__(self, value: int) -> None:
        ...

    def __int__(self) -> int:
        ...

    @property
    def name(self) -> str:
        ...

    @property
    def value(self) -> int:
        ...

class MemoryPoolType:
    DLA_GLOBAL_DRAM: ClassVar[MemoryPoolType]
    DLA_LOCAL_DRAM: ClassVar[MemoryPoolType]
    DLA_MANAGED_SRAM: ClassVar[MemoryPoolType]
    TACTIC_DRAM: ClassVar[MemoryPoolType]
    TACTIC_SHARED_MEMORY: ClassVar[MemoryPoolType]
    WORKSPACE: ClassVar[MemoryPoolType]
    __members__: ClassVar[dict[str, MemoryPoolType]]

    def __init__(self, value: int) -> None:
        ...

    def __int__(self) -> int:
        ...

    @property
    def name(self) -> str:
        ...

    @property
    def value(self) -> int:
        ...

class NetworkDefinitionCreationFlag:
    EXPLICIT_BATCH: ClassVar[NetworkDefinitionCreationFlag]
    PREFER_AOT_PYTHON_PLUGINS: ClassVar[NetworkDefinitionCreationFlag]
    PREFER_JIT_PYTHON_PLUGINS: ClassVar[NetworkDefinitionCreationFlag]
    STRONGLY_TYPED: ClassVar[NetworkDefinitionCreationFlag]
    __members__: ClassVar[dict[str, NetworkDefinitionCreationFlag]]

    def __init__(self, value: int) -> None:
        ...

    def __int__(self) -> int:
        ...

    @property
    def name(self) -> str:
        ...

    @property
    def value(self) -> int:
        ...

class OnnxParser:
    flags: int

    def __init__(self, network: INetworkDefinition, logger: ILogger) -> None:
        ...

    def clear_errors(self) -> None:
        ...

    def clear_flag(self, flag: Any) -> None:
        ...

    def get_error(self, index: int) -> Any:
        ...

    def get_flag(self, flag: Any) -> bool:
        ...

    def get_layer_output_tensor(self, name: str, i: int) -> ITensor:
        ...

    def get_subgraph_nodes(self, index: int) -> Any:
        ...

    def get_used_vc_plugin_libraries(self) -> list[str]:
        ...

    def is_subgraph_supported(self, index: int) -> bool:
        ...

    def load_initializer(self, name: str, data: int, size: int) -> bool:
        ...

    def load_model_proto(self, model: Any, path: str=...) -> bool:
        ...

    def parse(self, model: Any, path: str=...) -> bool:
        ...

    def parse_from_file(self, model: str) -> bool:
        ...

    def parse_model_proto(self) -> bool:
        ...

    def parse_with_weight_descriptors(self, model: Any) -> bool:
        ...

    def set_flag(self, flag: Any) -> None:
        ...

    def supports_model(self, model: Any, path: str=...) -> tuple[bool, list[tuple[list[int], bool]]]:
        ...

    def supports_model_v2(self, model: Any, path: str=...) -> bool:
        ...

    def supports_operator(self, op_name: str) -> bool:
        ...

    @property
    def num_errors(self) -> int:
        ...

    @property
    def num_subgraphs(self) -> int:
        ...

class ParserError:

    def code(self) -> Any:
        ...

    def desc(self) -> str:
        ...

    def file(self) -> str:
        ...

    def func(self) -> str:
        ...

    def line(self) -> int:
        ...

    def local_function_stack(self) -> list[str]:
        ...

    def local_function_stack_size(self) -> int:
        ...

    def node(self) -> int:
        ...

    def node_name(self) -> str:
        ...

    def node_operator(self) -> str:
        ...

class ProfilingVerbosity:
    DETAILED: ClassVar[ProfilingVerbosity]
    LAYER_NAMES_ONLY: ClassVar[ProfilingVerbosity]
    NONE: ClassVar[ProfilingVerbosity]
    __members__: ClassVar[dict[str, ProfilingVerbosity]]

    def __init__(self, value: int) -> None:
        ...

    def __int__(self) -> int:
        ...

    @property
    def name(self) -> str:
        ...

    @property
    def value(self) -> int:
        ...

class Runtime:
    DLA_core: int
    engine_host_code_allowed: bool
    error_recorder: Any
    max_threads: int
    tempfile_control_flags: int
    temporary_directory: str

    def __init__(self, logger: ILogger) -> None:
        ...

    def deserialize_cuda_engine(self, serialized_engine: Any) -> ICudaEngine:
        ...

    def get_plugin_registry(self) -> Any:
        ...

    def load_runtime(self, path: str) -> Runtime:
        ...

    @property
    def logger(self) -> ILogger:
        ...

    @property
    def num_DLA_cores(self) -> int:
        ...

class TacticSource:
    CUBLAS: ClassVar[TacticSource]
    CUBLAS_LT: ClassVar[TacticSource]
    CUDNN: ClassVar[TacticSource]
    EDGE_MASK_CONVOLUTIONS: ClassVar[TacticSource]
    JIT_CONVOLUTIONS: ClassVar[TacticSource]
    __members__: ClassVar[dict[str, TacticSource]]

    def __init__(self, value: int) -> None:
        ...

    def __int__(self) -> int:
        ...

    @property
    def name(self) -> str:
        ...

    @property
    def value(self) -> int:
        ...

class TensorIOMode:
    INPUT: ClassVar[TensorIOMode]
    NONE: ClassVar[TensorIOMode]
    OUTPUT: ClassVar[TensorIOMode]
    __members__: ClassVar[dict[str, TensorIOMode]]

    def __init__(self, value: int) -> None:
        ...

    def __int__(self) -> int:
        ...

    @property
    def name(self) -> str:
        ...

    @property
    def value(self) -> int:
        ...

class TilingOptimizationLevel:
    FAST: ClassVar[TilingOptimizationLevel]
    FULL: ClassVar[TilingOptimizationLevel]
    MODERATE: ClassVar[TilingOptimizationLevel]
    NONE: ClassVar[TilingOptimizationLevel]
    __members__: ClassVar[dict[str, TilingOptimizationLevel]]

    def __init__(self, value: int) -> None:
        ...

    def __int__(self) -> int:
        ...

    @property
    def name(self) -> str:
        ...

    @property
    def value(self) -> int:
        ...
