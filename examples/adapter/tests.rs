//! All commands over the files that the real peft and transformers wrote.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Result;
use burn::tensor::{DType, Device, FloatDType, Int, Tensor};
use burn_peft::{AdapterDirectory, PeftModel};
use burn_peft_llama::LlamaForCausalLm;
use safetensors::SafeTensors;
use tempfile::TempDir;

use crate::cli::{ExportArgs, GgufPrecision, MergeArgs, Precision};
use crate::export;
use crate::inspect::report;
use crate::merge::{Merged, Plan};
use burn_peft_examples::failure;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures").join(name)
}

/// Every adapter of a model that is among the fixtures, with that model.
fn adapters() -> Vec<(String, String)> {
    let mut found = vec![];
    for entry in fs::read_dir(fixture("")).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        let Ok(adapter) = AdapterDirectory::open(fixture(&name)) else { continue };
        if let Some(base) = &adapter.config().file().base_model_name_or_path {
            found.push((name, base.clone()));
        }
    }
    assert!(found.len() >= 20, "{found:?}");
    found
}

fn copied(name: &str) -> TempDir {
    let copy = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(fixture(name)).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), copy.path().join(entry.file_name())).unwrap();
    }
    copy
}

fn edit(directory: &Path, from: &str, to: &str) {
    let path = directory.join("adapter_config.json");
    let text = fs::read_to_string(&path).unwrap();
    assert!(text.contains(from), "{text}");
    fs::write(path, text.replace(from, to)).unwrap();
}

/// Changes the first value of a tensor of 32-bit numbers.
fn poke(directory: &Path, key: &str, value: f32) {
    let path = directory.join("adapter_model.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let (header, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
    let start = 8 + header + metadata.info(key).unwrap().data_offsets.0;
    bytes[start..start + 4].copy_from_slice(&value.to_le_bytes());
    fs::write(path, bytes).unwrap();
}

fn error<T>(result: Result<T>) -> String {
    failure::text(&result.err().unwrap())
}

mod inspecting {
    use super::*;

    /// The line of a report that starts with `start`, its cells apart by one space.
    fn line(text: &str, start: &str) -> String {
        let mut lines = text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "));
        lines.find(|line| line.starts_with(start)).unwrap_or_else(|| panic!("no `{start}` in\n{text}"))
    }

    #[test]
    fn every_adapter_of_peft_is_usable() {
        for (name, base) in adapters() {
            let report = report(&fixture(&name)).unwrap();
            assert!(report.usable, "{name}:\n{}", report.text);
            assert_eq!(line(&report.text, "base_model"), format!("base_model_name_or_path {base}"));
            assert!(report.text.contains("\nusable: loads on any model with these modules\n"));
        }
        assert!(report(&fixture("toy")).unwrap().usable);
    }

    #[test]
    fn settings_and_modules_are_told() {
        let text = report(&fixture("mha-biased-patterns")).unwrap().text;
        assert_eq!(line(&text, "peft_version"), "peft_version 0.21.2");
        assert_eq!(line(&text, "lora_alpha"), "lora_alpha 7 (scaling 2.3333)");
        assert_eq!(
            line(&text, "alpha_pattern"),
            r"alpha_pattern .*\.1\..*_proj = 6, k_proj = 4.5, q_proj = 9"
        );
        assert_eq!(
            line(&text, "adapter_model"),
            "adapter_model.safetensors: 23.1 kB, 28 tensors (F32), 4,920 parameters"
        );
        assert!(line(&text, "self_attn.q_proj").starts_with("self_attn.q_proj 1 0 48 48 2 4.5 "), "{text}");
        assert!(!text.contains("use_rslora") && !text.contains("other tensors"), "{text}");

        let text = report(&fixture("gqa-tied-rslora")).unwrap().text;
        assert_eq!(line(&text, "use_rslora"), "use_rslora true");
        assert!(line(&text, "mlp.down_proj").starts_with("mlp.down_proj 2 0-1 56 32 4 "), "{text}");

        let text = report(&fixture("gqa-tied-embedding")).unwrap().text;
        assert!(line(&text, "embed_tokens 1 96 32 3 0.6667").len() > 30, "{text}");
        assert!(text.contains("the base's own weight, repeated"), "{text}");

        let text = report(&fixture("mha-biased-bias-all")).unwrap().text;
        assert_eq!(line(&text, "bias"), "bias all");
        assert!(
            line(&text, "mlp.up_proj.bias").starts_with("mlp.up_proj.bias trained copy 2 [72] "),
            "{text}"
        );
    }

    #[test]
    fn the_norm_of_an_update_is_that_of_the_dense_product() {
        let adapter = AdapterDirectory::open(fixture("mha-biased-head")).unwrap();
        let module = adapter.modules().iter().find(|module| module.name == "lm_head").unwrap();
        let values = |key: &str| -> Vec<f32> {
            adapter.read(key, &Device::flex()).unwrap().into_data().iter::<f32>().collect()
        };
        let (a, b) = (values(&module.a), values(&module.b));
        let mut sum = 0.0;
        for row in b.chunks(module.r) {
            for i in 0..module.d_input {
                let product: f32 = row.iter().enumerate().map(|(k, b)| b * a[k * module.d_input + i]).sum();
                sum += (module.scaling * f64::from(product)).powi(2);
            }
        }
        let norm = |values: &[f32]| values.iter().map(|value| f64::from(value * value)).sum::<f64>().sqrt();
        let told = format!("{0:.2} {0:.2} {1:.2} {2:.2}", sum.sqrt(), norm(&a), norm(&b));
        let text = report(&fixture("mha-biased-head")).unwrap().text;
        assert_eq!(line(&text, "lm_head 1"), format!("lm_head 1 48 96 4 1.5 {told}"));
    }

    #[test]
    fn named_adapters_are_told_one_after_the_other() {
        let report = report(&fixture("two-adapters")).unwrap();
        assert!(report.usable);
        let (one, two) = (report.text.find("/one\n").unwrap(), report.text.find("/two\n").unwrap());
        assert!(one < two);

        let copy = copied("gqa-tied-qv");
        fs::create_dir(copy.path().join("other")).unwrap();
        fs::copy(copy.path().join("adapter_config.json"), copy.path().join("other/adapter_config.json"))
            .unwrap();
        let text = super::report(copy.path()).unwrap().text;
        assert!(text.ends_with("\nmore adapters in sub-directories: other\n"), "{text}");

        // One of them alone cannot be read.
        fs::remove_file(copy.path().join("adapter_config.json")).unwrap();
        let report = super::report(copy.path()).unwrap();
        assert!(
            !report.usable && report.text.contains("there is no `adapter_model.safetensors`"),
            "{}",
            report.text
        );
    }

    #[test]
    fn all_reasons_for_a_refusal_are_told() {
        let copy = copied("gqa-tied-qv");
        edit(copy.path(), "\"use_qalora\": false", "\"use_qalora\": true, \"new_key\": [3]");
        edit(copy.path(), "\"revision\": null", "\"revision\": null, \"idle_key\": {}");
        edit(copy.path(), "\"r\": 3", "\"r\": 4");
        edit(copy.path(), "\"v_proj\"", "\"w_proj\"");
        let report = report(copy.path()).unwrap();
        assert!(!report.usable);
        let refused = report.text.split("would be refused:\n").nth(1).unwrap();
        for part in [
            "`use_qalora` is true: merge the adapter in Python",
            "`new_key` is [3]: ",
            "shape mismatch at `base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`: expected [4, 32], found [3, 32]",
            "unexpected `base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight`",
        ] {
            assert!(refused.contains(part), "{part} is not in\n{refused}");
        }
        assert!(
            report.text.contains("note: configuration keys without effect: `idle_key`: {}\n"),
            "{}",
            report.text
        );
    }

    #[test]
    fn what_is_no_adapter_is_an_error_with_the_way_out() {
        let copy = copied("gqa-tied-qv");
        let tensors = copy.path().join("adapter_model.safetensors");
        fs::rename(&tensors, copy.path().join("adapter_model.bin")).unwrap();
        let text = error(report(copy.path()));
        assert!(text.contains("is a pickle") && text.contains("hint: load it in Python"), "{text}");
        let text = error(report(&fixture("gqa-tied")));
        assert!(
            text.contains("it holds a whole model") && text.contains("hint: give it as the base"),
            "{text}"
        );
        let text = error(report(&fixture("absent")));
        assert!(text.contains("cannot read the directory"), "{text}");
    }

    #[test]
    fn what_loads_is_usable_and_what_does_not_says_why() {
        let inspect = |name: &str| report(&fixture("cases").join(name));
        for name in ["a04-lookahead-regex", "a09-eva", "b01-default-in-keys", "b06-embedding-layers"] {
            let report = inspect(name).unwrap();
            assert!(report.usable, "{}", report.text);
        }
        assert_eq!(line(&inspect("a09-eva").unwrap().text, "init_lora_weights"), "init_lora_weights eva");
        for (name, part) in [
            ("b02-no-prefix", "lack the prefix `base_model.model.`"),
            ("a11-unknown-value", "delete the entry from the file"),
        ] {
            let report = inspect(name).unwrap();
            assert!(!report.usable && report.text.contains(part), "{}", report.text);
        }
        for (name, part) in [("b10-lfs-pointer", "git lfs pull"), ("b13-mlx", "mlx_lm.fuse")] {
            let text = error(inspect(name));
            assert!(text.contains(part), "{text}");
        }
    }

    #[test]
    fn values_that_are_not_finite_and_updates_of_zero_are_pointed_out() {
        let copy = copied("gqa-tied-qv");
        let key = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight";
        poke(copy.path(), key, f32::INFINITY);
        let text = report(copy.path()).unwrap().text;
        assert!(
            text.contains("warning: 1 tensor with infinities or NaNs; merging will be refused"),
            "{text}"
        );
        assert!(
            text.contains(&format!("  {key}\n")) && line(&text, "self_attn.v_proj").contains("NaN"),
            "{text}"
        );
        assert!(!line(&text, "self_attn.q_proj").contains("NaN"), "{text}");

        let fresh = tempfile::tempdir().unwrap();
        let mut model = LlamaForCausalLm::from_pretrained(fixture("gqa-tied"), &Device::flex()).unwrap();
        let config = burn_peft::LoraConfig::new(2).with_target_modules(["q_proj"]);
        model.add_adapter("default", &config).unwrap();
        model.save_adapter("default", fresh.path()).unwrap();
        let text = report(fresh.path()).unwrap().text;
        assert!(text.contains("note: every update is zero"), "{text}");
    }
}

mod programs {
    use super::*;

    /// What is told about each program, by its name.
    fn verdicts(directory: &Path) -> BTreeMap<String, String> {
        let text = report(directory).unwrap().text;
        let told = text.split("\nloads in\n").nth(1).unwrap();
        let lines = told.lines().take(3).map(|line| line.trim_start().split_once(' ').unwrap());
        lines.map(|(name, verdict)| (name.to_string(), verdict.trim().to_string())).collect()
    }

    #[test]
    fn plain_adapters_load_everywhere() {
        for name in ["gqa-tied-qv", "gqa-tied-rslora", "mha-biased-patterns", "qwen2-qv"] {
            let told = verdicts(&fixture(name));
            assert_eq!((&*told["peft"], &*told["vLLM"]), ("yes", "yes"), "{name}");
            assert_eq!(
                told["llama.cpp"], "yes, on a LLaMA or Qwen2, as a GGUF file, which `adapter export` makes",
                "{name}"
            );
        }
    }

    #[test]
    fn what_a_program_lacks_is_told_with_the_way_out() {
        for (name, vllm, llama_cpp) in [
            (
                "gqa-tied-dora",
                "no, because it has no DoRA",
                "no, because `model.layers.0.mlp.down_proj` has a magnitude",
            ),
            (
                "mha-biased-save-head",
                "no, because `modules_to_save` is lm_head",
                "no, because `lm_head` was trained as a whole",
            ),
            ("mha-biased-bias-all", "no, because `bias` is \"all\"", "no, because the bias of `"),
            ("gqa-tied-lora-bias", "no, because it has no `lora_bias`", "no, because `"),
            (
                "gqa-tied-tokens",
                "no, because it has no trained tokens",
                "no, because `model.embed_tokens` has ",
            ),
            (
                "mha-biased-embedding-head",
                "yes, on a LLaMA: ",
                "yes, on a LLaMA or Qwen2, as a GGUF file, which `adapter export` makes, if the base",
            ),
        ] {
            let told = verdicts(&fixture(name));
            assert_eq!(told["peft"], "yes", "{name}");
            assert!(told["vLLM"].starts_with(vllm), "{name}: {}", told["vLLM"]);
            assert!(told["llama.cpp"].starts_with(llama_cpp), "{name}: {}", told["llama.cpp"]);
        }
        let copy = copied("gqa-tied-qv");
        edit(copy.path(), "\"use_qalora\": false", "\"use_qalora\": true");
        assert!(verdicts(copy.path()).values().all(|told| told.starts_with("not known")));
        let copy = copied("gqa-tied-qv");
        edit(copy.path(), "\"init_lora_weights\": false", "\"init_lora_weights\": \"pissa\"");
        assert!(verdicts(copy.path())["vLLM"].starts_with("no, because `init_lora_weights` is \"pissa\""));
    }

    #[test]
    fn numbers_that_export_refuses_are_a_no_for_llama_cpp() {
        let place = tempfile::tempdir().unwrap();
        let key = |name: &str| format!("base_model.model.model.layers.{name}.weight");
        let first = key("0.self_attn.q_proj.lora_A");
        let reason = format!("a value of `{first}` is infinite or not a number");
        for value in [f32::NAN, f32::NEG_INFINITY] {
            let copy = copied("gqa-tied-qv");
            poke(copy.path(), &first, value);
            let told = verdicts(copy.path());
            assert_eq!((&*told["peft"], &*told["vLLM"]), ("yes", "yes"));
            let llama_cpp = &told["llama.cpp"];
            assert!(llama_cpp.starts_with(&format!("no, because {reason}, which `")), "{llama_cpp}");
            assert!(!llama_cpp.contains("merge"), "{llama_cpp}");
            let plan = export::Plan::new(&ExportArgs {
                model: fixture("gqa-tied"),
                adapter: vec![copy.path().into()],
                merged: false,
                weights: vec![],
                dtype: None,
                out: place.path().join("out.gguf"),
            });
            let text = error(plan.unwrap().carry_out());
            assert!(text.contains(&reason), "{text}");

            poke(copy.path(), &key("1.self_attn.v_proj.lora_B"), value);
            let llama_cpp = &verdicts(copy.path())["llama.cpp"];
            assert!(llama_cpp.contains("number (1 tensor more like it), which `"), "{llama_cpp}");
        }
        // Weights of the base with such numbers are those of no base.
        let copy = copied("cases/b06-embedding-layers");
        poke(copy.path(), "base_model.model.lm_head.weight", f32::INFINITY);
        let llama_cpp = &verdicts(copy.path())["llama.cpp"];
        assert!(
            llama_cpp.starts_with("no, because a value of `base_model.model.lm_head.weight` is"),
            "{llama_cpp}"
        );
        // Merging is no way out here.
        let copy = copied("gqa-tied-dora");
        let magnitude = "base_model.model.model.layers.0.mlp.down_proj.lora_magnitude_vector";
        poke(copy.path(), magnitude, f32::NAN);
        let told = verdicts(copy.path());
        let (vllm, llama_cpp) = (&told["vLLM"], &told["llama.cpp"]);
        assert!(vllm.starts_with("no, because it has no DoRA") && !vllm.contains("merge"), "{vllm}");
        assert!(llama_cpp.starts_with("no, because `model.layers.0.mlp.down_proj` has a"), "{llama_cpp}");
        assert!(llama_cpp.contains("; it cannot be merged either"), "{llama_cpp}");
    }

    #[test]
    fn weights_of_the_base_in_an_adapter_are_told() {
        let told = verdicts(&fixture("cases/b06-embedding-layers"));
        let (vllm, llama_cpp) = (&told["vLLM"], &told["llama.cpp"]);
        assert!(vllm.starts_with("no, because `base_model.model.lm_head.weight` is a weight of"), "{vllm}");
        assert!(llama_cpp.starts_with("yes, on a LLaMA or Qwen2, "), "{llama_cpp}");
        assert!(llama_cpp.ends_with(", if `embed_tokens` and `lm_head` in it are the base's"), "{llama_cpp}");
        let told = verdicts(&fixture("mha-biased-embedding-head"));
        assert!(told["vLLM"].starts_with("yes, "), "vLLM passes over `base_layer`: {}", told["vLLM"]);
    }

    #[test]
    fn ranks_that_vllm_is_to_be_told_of() {
        let saved = |r: usize| {
            let place = tempfile::tempdir().unwrap();
            let mut model = LlamaForCausalLm::from_pretrained(fixture("gqa-tied"), &Device::flex()).unwrap();
            let config = burn_peft::LoraConfig::new(2)
                .with_target_modules(["q_proj"])
                .with_rank_pattern([("q_proj", r)]);
            model.add_adapter("default", &config).unwrap();
            model.save_adapter("default", place.path()).unwrap();
            verdicts(place.path())["vLLM"].clone()
        };
        assert_eq!(saved(16), "yes");
        assert_eq!(saved(17), "yes, with `--max-lora-rank 32`: the rank is 17, and the default allows 16");
        assert_eq!(saved(300), "yes, with `--max-lora-rank 320`: the rank is 300, and the default allows 16");
        assert!(saved(513).starts_with("no, because the rank is 513, and its largest is 512"));
    }
}

mod exporting {
    use super::*;

    /// A base of the fixtures with a tokenizer.
    fn base(place: &Path, name: &str) -> PathBuf {
        let directory = place.join(name);
        fs::create_dir(&directory).unwrap();
        for from in [fixture(name), fixture("gguf")] {
            for entry in fs::read_dir(from).unwrap().map(Result::unwrap) {
                let name = entry.file_name().into_string().unwrap();
                if !name.contains("expected") && !name.contains("gguf") && !name.ends_with(".header") {
                    fs::copy(entry.path(), directory.join(name)).unwrap();
                }
            }
        }
        directory
    }

    fn args(model: &Path, adapters: &[&Path], out: &Path) -> ExportArgs {
        ExportArgs {
            model: model.into(),
            adapter: adapters.iter().map(|path| path.to_path_buf()).collect(),
            merged: false,
            weights: vec![],
            dtype: None,
            out: out.into(),
        }
    }

    #[test]
    fn an_adapter_is_written_with_the_command_that_uses_it() {
        let place = tempfile::tempdir().unwrap();
        let out = place.path().join("deep/adapter.gguf");
        let plan = export::Plan::new(&args(&fixture("gqa-tied"), &[&fixture("gqa-tied-qv")], &out)).unwrap();
        assert!(!plan.to_string().contains("note"), "{plan}");
        let exported = plan.carry_out().unwrap().to_string();
        assert!(exported.contains("adapter.gguf: 3.5 kB, f32, 8 tensors, alpha 5.00\n"), "{exported}");
        assert_eq!(fs::read(&out).unwrap(), fs::read(fixture("gguf/gqa-tied-qv.gguf")).unwrap());
        let next = plan.next();
        let base = out.with_file_name("base.gguf");
        assert!(
            next.ends_with(&format!("llama-cli -m {} --lora {}", base.display(), out.display())),
            "{next}"
        );
        assert!(
            next.contains("--example adapter -- export --model ") && next.contains(" --merged --out "),
            "{next}"
        );

        let patterns =
            args(&fixture("mha-biased"), &[&fixture("mha-biased-patterns")], &place.path().join("b.gguf"));
        let plan = export::Plan::new(&patterns).unwrap();
        assert!(plan.to_string().contains("note     a file has one alpha"), "{plan}");
    }

    #[test]
    fn a_model_is_written_with_adapters_or_without() {
        let place = tempfile::tempdir().unwrap();
        let base = base(place.path(), "gqa-tied");
        let written = |name: &str, adapters: &[&Path], weights: Vec<f64>, dtype| {
            let out = place.path().join(name);
            let plan = export::Plan::new(&ExportArgs {
                merged: true,
                weights,
                dtype,
                ..args(&base, adapters, &out)
            })
            .unwrap();
            let told = plan.carry_out().unwrap().to_string();
            assert_eq!(plan.next(), format!("llama-cli -m {}", out.display()));
            (fs::read(&out).unwrap(), told)
        };
        let (plain, told) = written("plain.gguf", &[], vec![], None);
        assert!(told.starts_with("wrote ") && told.contains("44.4 kB, f16, 20 tensors\n"), "{told}");
        let adapter = fixture("gqa-tied-qv");
        let (merged, told) = written("merged.gguf", &[&adapter], vec![], Some(GgufPrecision::F16));
        assert!(told.starts_with("merged   4 tensors\n"), "{told}");
        let (half, _) = written("half.gguf", &[&adapter], vec![0.5], None);
        let header = fs::read(fixture("gguf/gqa-tied.f16.header")).unwrap().len();
        assert!(plain[..header] == merged[..header] && plain != merged && merged != half);
        let (zero, _) = written("zero.gguf", &[&adapter], vec![0.0], None);
        assert!(zero == plain, "an adapter without weight changes nothing");
    }

    #[test]
    fn an_embedding_that_was_changed_is_refused() {
        let place = tempfile::tempdir().unwrap();
        let out = place.path().join("new/adapter.gguf");
        let model = fixture("cases/base-untied");
        let copy = copied("cases/b06-embedding-layers");
        export::Plan::new(&args(&model, &[copy.path()], &out)).unwrap();
        poke(copy.path(), "base_model.model.model.embed_tokens.weight", 9.0);
        let text = error(export::Plan::new(&args(&model, &[copy.path()], &out)));
        assert!(text.contains("`base_model.model.model.embed_tokens.weight` is not the weight"), "{text}");
        assert!(text.contains("hint: give the whole directory of the base"), "{text}");
        assert_eq!(fs::read_dir(place.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_command_has_quotes_where_a_shell_needs_them() {
        let place = tempfile::tempdir().unwrap();
        let out = place.path().join("my adapter.gguf");
        let plan = export::Plan::new(&args(&fixture("gqa-tied"), &[&fixture("gqa-tied-qv")], &out)).unwrap();
        let next = plan.next();
        assert!(next.ends_with(&format!(" --lora '{}'", out.display())), "{next}");
    }

    #[test]
    fn two_tables_that_the_configuration_denies_are_no_news() {
        let place = tempfile::tempdir().unwrap();
        let note = |model: &Path, adapter: &str| {
            let (adapter, out) = (fixture(adapter), place.path().join("out.gguf"));
            let args = ExportArgs { merged: true, ..args(model, &[&adapter], &out) };
            export::Plan::new(&args)
                .unwrap()
                .to_string()
                .contains("note     an adapter changes the embedding")
        };
        assert!(note(&base(place.path(), "gqa-tied"), "gqa-tied-embedding"));
        let untied = base(place.path(), "mha-biased");
        let path = untied.join("config.json");
        let text = fs::read_to_string(&path).unwrap();
        let (no, yes) = ("\"tie_word_embeddings\": false", "\"tie_word_embeddings\": true");
        assert!(text.contains(no), "{text}");
        fs::write(path, text.replace(no, yes)).unwrap();
        assert!(!note(&untied, "mha-biased-embedding-head"));
    }

    #[test]
    fn whatever_is_wrong_is_found_before_anything_is_written() {
        let place = tempfile::tempdir().unwrap();
        let out = place.path().join("out.gguf");
        let (model, adapter) = (fixture("gqa-tied"), fixture("gqa-tied-qv"));
        let refused = |args: ExportArgs| error(export::Plan::new(&args).map(|_| ()));
        let text = refused(args(&model, &[&adapter, &adapter], &out));
        assert!(
            text.contains("expected one adapter for one file, found 2") && text.contains("`--merged`"),
            "{text}"
        );
        let text = refused(ExportArgs { weights: vec![0.5], ..args(&model, &[&adapter], &out) });
        assert!(text.contains("--lora-scaled"), "{text}");
        let text = refused(args(&model, &[&fixture("gqa-tied-dora")], &out));
        assert!(text.contains("has a magnitude of DoRA") && text.contains("hint: merge it"), "{text}");
        let text = refused(args(&fixture("mha-biased"), &[&adapter], &out));
        assert!(text.contains("does not fit the model"), "{text}");
        let text = refused(ExportArgs { merged: true, ..args(&model, &[], &out) });
        assert!(text.contains("tokenizer.json"), "{text}");
        fs::write(&out, "mine").unwrap();
        let text = refused(args(&model, &[&adapter], &out));
        assert!(text.contains("cannot write") && text.contains("choose another name"), "{text}");
        assert_eq!(fs::read_to_string(&out).unwrap(), "mine");
        assert_eq!(fs::read_dir(place.path()).unwrap().count(), 1);
    }
}

mod merging {
    use super::*;

    const BOTH: [&str; 2] = ["two-adapters/one", "two-adapters/two"];

    fn args(model: &Path, adapters: &[&Path], out: &Path) -> MergeArgs {
        MergeArgs {
            model: model.into(),
            adapter: adapters.iter().map(|path| path.to_path_buf()).collect(),
            weights: vec![],
            dtype: Precision::Keep,
            out: out.into(),
        }
    }

    fn merge(args: &MergeArgs) -> Result<Merged> {
        Plan::new(args)?.carry_out()
    }

    fn logits(model: &LlamaForCausalLm) -> Vec<f32> {
        let ids = Tensor::<2, Int>::from_data([[1, 17, 5, 63, 2, 40, 40, 8]], &Device::flex());
        model.forward(ids, None).cast(DType::F32).into_data().iter::<f32>().collect()
    }

    fn load(directory: &Path, dtype: FloatDType) -> LlamaForCausalLm {
        LlamaForCausalLm::from_pretrained_as(directory, &Device::flex(), dtype).unwrap()
    }

    fn largest_difference(one: &[f32], other: &[f32]) -> f32 {
        assert_eq!(one.len(), other.len());
        one.iter().zip(other).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
    }

    /// The tensors of a model directory in f32.
    fn tensors(directory: &Path) -> BTreeMap<String, Vec<f32>> {
        let bytes = fs::read(directory.join("model.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let values = |bytes: &[u8]| bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
        file.iter().map(|(name, tensor)| (name.to_string(), values(tensor.data()))).collect()
    }

    #[test]
    fn a_merged_model_computes_what_the_adapted_one_does() {
        for (name, base) in adapters() {
            let (model, adapter) = (fixture(&base), fixture(&name));
            let out = tempfile::tempdir().unwrap();
            let result = merge(&args(&model, &[&adapter], out.path()));
            if name == "gqa-tied-lora-bias" {
                let text = error(result);
                assert!(text.contains("`model.layers.0.self_attn.q_proj` has no bias to merge"), "{text}");
                continue;
            }
            result.unwrap();
            let mut adapted = load(&model, FloatDType::F32);
            let before = logits(&adapted);
            adapted.load_adapter("default", &adapter).unwrap();
            let expected = logits(&adapted);
            let merged = logits(&load(out.path(), FloatDType::F32));
            let scale = expected.iter().fold(1.0f32, |largest, value| largest.max(value.abs()));
            let difference = largest_difference(&merged, &expected);
            // Measured: up to 1.2e-5, of `mha-biased-patterns`; it depends on the processor.
            assert!(difference <= 2e-5 * scale, "{name}: {difference} of {scale}");
            assert!(largest_difference(&before, &expected) > 1e-2, "{name}: the adapter changes nothing");
        }
    }

    #[test]
    fn a_shared_table_is_kept_unless_an_adapter_changes_it() {
        for (adapter, is_tied) in [("gqa-tied-qv", true), ("gqa-tied-embedding", false)] {
            let out = tempfile::tempdir().unwrap();
            let args = args(&fixture("gqa-tied"), &[&fixture(adapter)], out.path());
            let plan = Plan::new(&args).unwrap();
            assert_eq!(plan.to_string().contains("tie_word_embeddings false"), !is_tied);
            plan.carry_out().unwrap();
            assert_eq!(tensors(out.path()).contains_key("lm_head.weight"), !is_tied);
            assert_eq!(load(out.path(), FloatDType::F32).config().tie_word_embeddings, is_tied);
        }
    }

    #[test]
    fn an_adapter_of_the_output_layer_unties_it() {
        // One of an untied model, cut down to its output layer, on a tied model of the same sizes.
        let base = tempfile::tempdir().unwrap();
        let mut model = load(&fixture("gqa-tied"), FloatDType::F32);
        model.save_pretrained(base.path()).unwrap();
        model.untie_lm_head();
        let config = burn_peft::LoraConfig::new(2)
            .with_target_modules(["lm_head"])
            .with_init_lora_weights(burn_peft::InitLoraWeights::Random);
        model.add_adapter("default", &config).unwrap();
        let (adapter, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        model.save_adapter("default", adapter.path()).unwrap();
        merge(&args(base.path(), &[adapter.path()], out.path())).unwrap();
        let expected = logits(&model);
        assert!(largest_difference(&logits(&load(out.path(), FloatDType::F32)), &expected) < 1e-4);
        assert!(largest_difference(&logits(&load(base.path(), FloatDType::F32)), &expected) > 1e-2);
    }

    #[test]
    fn several_adapters_are_summed_with_their_weights() {
        let base = fixture("gqa-tied");
        let [one, two] = BOTH.map(fixture);
        let merged = |adapters: &[&Path], weights: &[f64]| {
            let out = tempfile::tempdir().unwrap();
            let args = MergeArgs { weights: weights.to_vec(), ..args(&base, adapters, out.path()) };
            merge(&args).unwrap();
            tensors(out.path())
        };
        let (plain, first, second) = (tensors(&base), merged(&[&one], &[]), merged(&[&two], &[]));
        for (weights, [x, y]) in
            [(&[][..], [1.0, 1.0]), (&[0.5, -0.25], [0.5, -0.25]), (&[1.0, 1.0], [1.0, 1.0])]
        {
            let both = merged(&[&one, &two], weights);
            for (name, values) in &plain {
                let expected: Vec<f32> = (0..values.len())
                    .map(|i| values[i] + x * (first[name][i] - values[i]) + y * (second[name][i] - values[i]))
                    .collect();
                assert!(largest_difference(&both[name], &expected) < 1e-5, "{name}");
            }
            let name = "model.layers.0.self_attn.v_proj.weight";
            assert!(largest_difference(&both[name], &plain[name]) > 1e-2);
        }
    }

    #[test]
    fn half_precision_is_rounded_once_and_the_error_reported() {
        let half = tempfile::tempdir().unwrap();
        load(&fixture("gqa-tied"), FloatDType::BF16).save_pretrained(half.path()).unwrap();
        let adapter = fixture("gqa-tied-qv");
        let name = "model.layers.0.self_attn.q_proj.weight";
        for (base, dtype) in [(half.path(), Precision::Keep), (&fixture("gqa-tied"), Precision::Bf16)] {
            let out = tempfile::tempdir().unwrap();
            let merged = merge(&MergeArgs { dtype, ..args(base, &[&adapter], out.path()) }).unwrap();
            let exact = tempfile::tempdir().unwrap();
            let wide = MergeArgs { dtype: Precision::F32, ..args(base, &[&adapter], exact.path()) };
            assert_eq!(merge(&wide).unwrap().merged.report.largest_error, 0.0);
            let weights = |directory: &Path, dtype| -> Vec<f32> {
                let model = load(directory, dtype);
                let weight = model.model.layers[0].self_attn.q_proj.weight.val().cast(DType::F32);
                weight.into_data().iter::<f32>().collect()
            };
            let exact = weights(exact.path(), FloatDType::F32);
            let rounded: Vec<f32> = exact.iter().map(|value| half::bf16::from_f32(*value).to_f32()).collect();
            assert_eq!(weights(out.path(), FloatDType::F32), rounded);
            let error = largest_difference(&exact, &rounded);
            assert!(merged.merged.report.largest_error >= error && error > 0.0, "{name}: {error}");
            assert!(merged.to_string().contains("largest rounding error "), "{merged}");
            let config = fs::read_to_string(out.path().join("config.json")).unwrap();
            assert!(config.contains("\"dtype\": \"bfloat16\""), "{config}");
        }
    }

    #[test]
    fn the_directory_is_that_of_the_base_with_other_weights() {
        let base = copied("gqa-tied");
        for name in ["tokenizer.json", "chat_template.jinja", "unrelated.bin"] {
            fs::write(base.path().join(name), name).unwrap();
        }
        let path = base.path().join("config.json");
        let config =
            fs::read_to_string(&path).unwrap().replacen('{', "{\"custom\": {\"b\": 1, \"a\": 2},", 1);
        fs::write(&path, config.replace("\"dtype\"", "\"torch_dtype\"")).unwrap();
        let parent = tempfile::tempdir().unwrap();
        let out = parent.path().join("deep/merged");
        let merged = merge(&args(base.path(), &[&fixture("gqa-tied-qv")], &out)).unwrap();
        let names = |directory: &Path| -> Vec<String> {
            let entries = fs::read_dir(directory).unwrap();
            let mut names: Vec<_> =
                entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
            names.sort();
            names
        };
        let expected = [
            "chat_template.jinja",
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "tokenizer.json",
        ];
        assert_eq!(names(&out), expected);
        assert_eq!(names(out.parent().unwrap()), ["merged"], "nothing temporary is left");
        assert_eq!(fs::read_to_string(out.join("tokenizer.json")).unwrap(), "tokenizer.json");
        let config: serde_json::Value =
            serde_json::from_str(&fs::read_to_string(out.join("config.json")).unwrap()).unwrap();
        assert_eq!(config["custom"]["b"], 1);
        assert_eq!((config["torch_dtype"].as_str(), config.get("dtype")), (Some("float32"), None));
        assert!(
            merged
                .to_string()
                .starts_with("merged   4 tensors of 3,072 parameters, largest rounding error 0\n")
        );
    }

    #[test]
    fn whatever_is_wrong_is_found_before_the_work() {
        let parent = tempfile::tempdir().unwrap();
        let out = parent.path().join("out");
        let (base, adapter) = (fixture("gqa-tied"), fixture("gqa-tied-qv"));
        let good = args(&base, &[&adapter], &out);
        let refused = |args: MergeArgs| error(Plan::new(&args));

        let text = refused(MergeArgs { weights: vec![1.0, 2.0], ..good.clone() });
        assert!(text.contains("expected as many weights as adapters, found 2 for 1 adapter"), "{text}");
        let text = refused(MergeArgs { out: base.clone(), ..good.clone() });
        assert!(text.contains("is not empty"), "{text}");
        let text = refused(MergeArgs { model: adapter.clone(), ..good.clone() });
        assert!(text.contains("config.json"), "{text}");
        let pointer = copied("gqa-tied");
        let pointed = fixture("cases/b10-lfs-pointer").join("adapter_model.safetensors");
        fs::copy(pointed, pointer.path().join("model.safetensors")).unwrap();
        let text = refused(MergeArgs { model: pointer.path().into(), ..good.clone() });
        assert!(text.contains("model.safetensors` is a git-LFS pointer"), "{text}");
        assert!(
            text.ends_with("hint: fetch the file with `git lfs pull`, in the repository that it is from\n"),
            "{text}"
        );
        let text = refused(MergeArgs { model: fixture("mha-biased"), ..good.clone() });
        assert!(text.contains("`model.layers.0.self_attn.q_proj` is [48, 48] in the model"), "{text}");
        assert!(text.contains("hint: it was trained on `gqa-tied`"), "{text}");

        let dora = copied("gqa-tied-qv");
        edit(dora.path(), "\"use_qalora\": false", "\"use_qalora\": true");
        let text = refused(args(&base, &[dora.path()], &out));
        assert!(text.contains("cannot use the adapter") && text.contains("`use_qalora` is true"), "{text}");

        let saved = fixture("mha-biased-save-head");
        let twice = args(&fixture("mha-biased"), &[&saved, &saved], &out);
        let text = refused(twice.clone());
        assert!(text.contains("both have a trained copy of one parameter"), "{text}");
        let text = refused(MergeArgs { weights: vec![0.5, 0.5], ..twice });
        assert!(text.contains("cannot be weighted"), "{text}");
        assert_eq!(fs::read_dir(parent.path()).unwrap().count(), 0, "nothing is left behind");
    }

    #[test]
    fn a_merge_that_fails_leaves_nothing() {
        let parent = tempfile::tempdir().unwrap();
        let broken = copied("gqa-tied-qv");
        poke(broken.path(), "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", f32::NAN);
        let args = args(&fixture("gqa-tied"), &[broken.path()], &parent.path().join("out"));
        let text = error(merge(&args));
        assert!(text.contains("non-finite weights at `model.layers.0.self_attn.q_proj`"), "{text}");
        assert_eq!(fs::read_dir(parent.path()).unwrap().count(), 0);
    }

    #[test]
    fn weights_of_the_base_beside_an_adapter_are_checked_and_change_nothing() {
        let parent = tempfile::tempdir().unwrap();
        let case = |name: &str| fixture("cases").join(name);
        let (plain, repeated) = (parent.path().join("plain"), parent.path().join("repeated"));
        merge(&args(&case("base-untied"), &[&case("b06-embedding-layers")], &repeated)).unwrap();
        let factors = parent.path().join("factors");
        fs::create_dir(&factors).unwrap();
        fs::copy(
            case("b06-embedding-layers").join("adapter_config.json"),
            factors.join("adapter_config.json"),
        )
        .unwrap();
        let bytes = fs::read(case("b06-embedding-layers").join("adapter_model.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let own = file.tensors().into_iter().filter(|(key, _)| key.contains(".lora_"));
        fs::write(factors.join("adapter_model.safetensors"), safetensors::serialize(own, None).unwrap())
            .unwrap();
        merge(&args(&case("base-untied"), &[&factors], &plain)).unwrap();
        assert_eq!(tensors(&repeated), tensors(&plain));
        // A table that is only repeated is no reason to untie it.
        let text = error(Plan::new(&args(&fixture("mha-biased"), &[&case("b06-embedding-layers")], &plain)));
        assert!(
            text.contains("`lm_head.weight` is [96, 48] in the model, [96, 32] in the adapter"),
            "{text}"
        );
    }

    #[test]
    fn an_output_layer_that_the_configuration_denies_is_kept_and_told() {
        let parent = tempfile::tempdir().unwrap();
        let case = |name: &str| fixture("cases").join(name);
        let base = parent.path().join("base");
        fs::create_dir(&base).unwrap();
        fs::copy(case("base-untied").join("model.safetensors"), base.join("model.safetensors")).unwrap();
        fs::copy(case("c17-tied-with-other-head").join("config.json"), base.join("config.json")).unwrap();
        let out = parent.path().join("out");
        let merged = merge(&args(&base, &[&case("a09-eva")], &out)).unwrap();
        assert!(merged.to_string().starts_with("note     config.json says tied"), "{merged}");
        assert_eq!(tensors(&out)["lm_head.weight"], tensors(&base)["lm_head.weight"]);
        let config = fs::read_to_string(out.join("config.json")).unwrap();
        assert!(config.contains("\"tie_word_embeddings\": false"), "{config}");
    }

    #[test]
    fn a_merge_cleans_up_after_one_that_was_killed() {
        let parent = tempfile::tempdir().unwrap();
        // As a killed one leaves it: a directory, and beside it the file that its writer had locked.
        fs::create_dir(parent.path().join(".staged-a1b2c3-out")).unwrap();
        fs::write(parent.path().join(".staged-a1b2c3-out/model.safetensors"), "half").unwrap();
        fs::write(parent.path().join(".staged-a1b2c3-out.lock"), "").unwrap();
        let out = parent.path().join("out");
        merge(&args(&fixture("gqa-tied"), &[&fixture("gqa-tied-qv")], &out)).unwrap();
        assert_eq!(fs::read_dir(parent.path()).unwrap().count(), 1);
    }

    #[test]
    fn numbers_too_large_for_the_type_are_refused() {
        let parent = tempfile::tempdir().unwrap();
        let large = copied("gqa-tied-qv");
        poke(large.path(), "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", 1e9);
        let args = args(&fixture("gqa-tied"), &[large.path()], &parent.path().join("out"));
        let text = error(merge(&MergeArgs { dtype: Precision::F16, ..args }));
        assert!(text.contains("self_attn.q_proj.weight` is too large for F16"), "{text}");
        assert!(text.contains("hint: bf16 and f32 hold larger ones"), "{text}");
    }
}
