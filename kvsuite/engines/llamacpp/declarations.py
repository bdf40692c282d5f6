"""llama.cpp's C interface as far as it is used, in the build that is pinned: `include/llama.h` and `ggml.h` at 11549.

Enumerations are declared as the int that they are. The structs that come and go by value have a tail that llama.cpp does not
know: were the real ones longer, it would write there and not beside it, and `library.check_layouts` would say so.
"""

from __future__ import annotations

DECLARATIONS = """
typedef void (*ggml_log_callback)(int32_t level, const char * text, void * user_data);
typedef void * (*opaque_callback)(void *);

struct llama_model_params {
    void * devices;
    const void * tensor_buft_overrides;
    int32_t n_gpu_layers;
    int32_t split_mode;
    int32_t load_mode;
    int32_t lazy_mode;
    int32_t main_gpu;
    const float * tensor_split;
    opaque_callback progress_callback;
    void * progress_callback_user_data;
    const void * kv_overrides;
    bool vocab_only;
    bool check_tensors;
    bool use_extra_bufts;
    bool no_host;
    bool no_alloc;
    bool load_mtp;
    char tail[256];
};

struct llama_context_params {
    uint32_t n_ctx;
    uint32_t n_batch;
    uint32_t n_ubatch;
    uint32_t n_seq_max;
    uint32_t n_rs_seq;
    uint32_t n_outputs_max;
    uint32_t n_outputs_max_per_seq;
    int32_t n_threads;
    int32_t n_threads_batch;
    int32_t ctx_type;
    int32_t rope_scaling_type;
    int32_t pooling_type;
    int32_t attention_type;
    int32_t flash_attn_type;
    float rope_freq_base;
    float rope_freq_scale;
    float yarn_ext_factor;
    float yarn_attn_factor;
    float yarn_beta_fast;
    float yarn_beta_slow;
    uint32_t yarn_orig_ctx;
    float defrag_thold;
    opaque_callback cb_eval;
    void * cb_eval_user_data;
    int32_t type_k;
    int32_t type_v;
    size_t moe_cache_size;
    opaque_callback abort_callback;
    void * abort_callback_data;
    bool embeddings;
    bool offload_kqv;
    bool no_perf;
    bool op_offload;
    bool swa_full;
    bool kv_unified;
    void * samplers;
    size_t n_samplers;
    void * ctx_other;
    char tail[256];
};

struct llama_batch {
    int32_t n_tokens;
    int32_t * token;
    float * embd;
    int32_t * pos;
    int32_t * n_seq_id;
    int32_t ** seq_id;
    int8_t * logits;
};

struct llama_model_params llama_model_default_params(void);
struct llama_context_params llama_context_default_params(void);
void llama_log_set(ggml_log_callback log_callback, void * user_data);
void llama_backend_init(void);

void * llama_model_load_from_file(const char * path_model, struct llama_model_params params);
void llama_model_free(void * model);
const void * llama_model_get_vocab(const void * model);
int32_t llama_vocab_n_tokens(const void * vocab);
int32_t llama_model_meta_val_str(const void * model, const char * key, char * buf, size_t buf_size);
uint64_t llama_model_size(const void * model);
uint64_t llama_model_n_params(const void * model);

void * llama_init_from_model(void * model, struct llama_context_params params);
void llama_free(void * ctx);
uint32_t llama_n_ctx_seq(const void * ctx);
uint32_t llama_n_batch(const void * ctx);
uint32_t llama_n_ubatch(const void * ctx);
uint32_t llama_n_seq_max(const void * ctx);
int32_t llama_n_threads(void * ctx);
void llama_set_n_threads(void * ctx, int32_t n_threads, int32_t n_threads_batch);
int32_t llama_decode(void * ctx, struct llama_batch batch);
float * llama_get_logits_ith(void * ctx, int32_t i);
size_t llama_state_seq_get_size(void * ctx, int32_t seq_id);

void * llama_get_memory(const void * ctx);
void llama_memory_clear(void * mem, bool data);
bool llama_memory_seq_rm(void * mem, int32_t seq_id, int32_t p0, int32_t p1);
void llama_memory_seq_cp(void * mem, int32_t seq_id_src, int32_t seq_id_dst, int32_t p0, int32_t p1);
void llama_memory_seq_add(void * mem, int32_t seq_id, int32_t p0, int32_t p1, int32_t delta);

struct gguf_init_params { bool no_alloc; void * ctx; };
void * gguf_init_from_file(const char * fname, struct gguf_init_params params);
void gguf_free(void * ctx);
int64_t gguf_find_tensor(const void * ctx, const char * name);
size_t gguf_get_tensor_size(const void * ctx, int64_t tensor_id);

const char * ggml_type_name(int32_t type);
int64_t ggml_blck_size(int32_t type);
size_t ggml_type_size(int32_t type);
"""

#: numbers of `kvsuite.cache_formats.ggml_format.GGML_TYPES` in ``enum ggml_type``
TYPE_NUMBERS = {
    "f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8, "iq4_nl": 20, "bf16": 30, "mxfp4": 39,
    "nvfp4": 40, "q2_0": 42,
}  # fmt: skip

#: ``enum llama_flash_attn_type`` by the values of ``--kv-flash-attention``
FLASH_ATTENTION = {"auto": -1, "off": 0, "on": 1}

#: what `llama_context_default_params` and `llama_model_default_params` return in the pinned build; pointers are NULL
CONTEXT_DEFAULTS: dict[str, float] = {
    "n_ctx": 512, "n_batch": 2048, "n_ubatch": 512, "n_seq_max": 1, "n_rs_seq": 0, "n_outputs_max": 0,
    "n_outputs_max_per_seq": 1, "n_threads": 4, "n_threads_batch": 4, "ctx_type": 0, "rope_scaling_type": -1,
    "pooling_type": -1, "attention_type": -1, "flash_attn_type": -1, "rope_freq_base": 0, "rope_freq_scale": 0,
    "yarn_ext_factor": -1, "yarn_attn_factor": -1, "yarn_beta_fast": -1, "yarn_beta_slow": -1, "yarn_orig_ctx": 0,
    "defrag_thold": -1, "type_k": 1, "type_v": 1, "moe_cache_size": 0, "embeddings": False, "offload_kqv": True,
    "no_perf": True, "op_offload": True, "swa_full": True, "kv_unified": False, "n_samplers": 0,
}  # fmt: skip
MODEL_DEFAULTS: dict[str, float] = {
    "n_gpu_layers": -1, "split_mode": 1, "load_mode": -1, "lazy_mode": 1, "main_gpu": 0, "vocab_only": False,
    "check_tensors": False, "use_extra_bufts": True, "no_host": False, "no_alloc": False, "load_mtp": False,
}  # fmt: skip
