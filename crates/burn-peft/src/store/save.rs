//! Writing adapters.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::path::Path;

use burn::module::Module;
use burn_peft_files::DirectoryWriter;

use super::condense::{MANY_TARGETS, condensed};
use super::{CONFIG_FILE, TENSOR_FILE, adapted_names, adapter_config, keys, tensors};
use crate::adapter::{Adapter, Change, Update};
use crate::error::PeftError;
use crate::inject::{Plan, module_names, parameters};
use crate::lora::LoraConfig;
use crate::seam::Layout;
use crate::target::{TargetModules, matches_name};

/// Writes adapter `name` of the model to `directory`.
pub(crate) fn save(layout: &Layout, name: &str, directory: &Path) -> Result<(), PeftError> {
    let adapters: Vec<&Adapter> = layout.states.values().filter_map(|state| state.get(name)).collect();
    let Some(first) = adapters.first() else {
        return Err(PeftError::UnknownAdapter { name: name.to_string(), available: vec![] });
    };
    let config = config_to_write(layout, &first.info.config, &adapters)?;
    let adapted = adapted_names(adapters.iter().map(|adapter| (&*adapter.info.site, change_of(adapter))));
    let mut tensors = vec![];
    for adapter in adapters {
        let (site, plain) = (&adapter.info.site, adapter.valid());
        for entry in keys::entries(site, change_of(adapter), config.lora_bias, adapted.contains(&site.name)) {
            if let Some(value) = keys::to_file(&plain, entry.part) {
                tensors.push((entry.key, entry.shape, value));
            }
        }
    }
    let (config_path, path) = (directory.join(CONFIG_FILE), directory.join(TENSOR_FILE));
    let config = adapter_config::to_json(&config, &config_path)?;
    let tensors = tensors::to_bytes(&path, &tensors)?;

    let writer = DirectoryWriter::open(directory).map_err(PeftError::io(directory))?;
    let stage = |name: &str, bytes: &[u8]| {
        let mut file = writer.stage(name)?;
        file.write_all(bytes)?;
        Ok(file)
    };
    let staged = stage(TENSOR_FILE, &tensors).map_err(PeftError::io(&path))?;
    let staged_config = stage(CONFIG_FILE, &config).map_err(PeftError::io(&config_path))?;
    // Tensors beside another adapter's configuration would load and mean something else. So an old configuration that
    // differs goes first and the new one comes last: whenever the process ends, and for readers who do not wait, the
    // directory holds no mixture.
    if std::fs::read(&config_path).is_ok_and(|old| old != config) {
        writer.remove(CONFIG_FILE).map_err(PeftError::io(&config_path))?;
    }
    staged.put().map_err(PeftError::io(&path))?;
    staged_config.put().map_err(PeftError::io(&config_path))
}

/// What `adapter` does to its parameter.
fn change_of(adapter: &Adapter) -> Change {
    let info = &adapter.info;
    match &adapter.update {
        Update::LowRank(factors) => Change::LowRank { r: factors.rank(), lora_alpha: info.config.lora_alpha },
        Update::Copy(copied) => Change::Copy { shift: copied.bias.as_ref().map(|_| info.scaling) },
        Update::Shift(_) => Change::Shift { scaling: info.scaling },
    }
}

/// The configuration as a file has to say it, so that whoever reads it arrives at these adapters.
fn config_to_write(
    layout: &Layout,
    config: &LoraConfig,
    adapters: &[&Adapter],
) -> Result<LoraConfig, PeftError> {
    let mut config = config.clone();
    let modules: BTreeSet<&str> = adapters
        .iter()
        .filter(|adapter| adapter.low_rank().is_some())
        .map(|adapter| &*adapter.info.site.name)
        .collect();
    config.target_modules = targets_to_write(layout, &config, &modules)?;
    // A file has its patterns in alphabetical order, and the first that matches counts. Where that changes a module's
    // rank or alpha, each module gets a pattern of its own.
    let mut sorted = config.clone();
    sorted.rank_pattern.sort_by(|a, b| a.0.cmp(&b.0));
    sorted.alpha_pattern.sort_by(|a, b| a.0.cmp(&b.0));
    let (ranks, sorted) = (config.ranks()?, sorted.ranks()?);
    let mut own: BTreeMap<&str, (usize, f64)> = BTreeMap::new();
    let mut order_matters = false;
    for &module in &modules {
        let values = ranks.of(module)?;
        order_matters |= sorted.of(module)? != values;
        own.insert(module, values);
    }
    if order_matters {
        let escape = |module: &str| format!("^{}", fancy_regex::escape(module));
        config.rank_pattern = own.iter().map(|(module, (r, _))| (escape(module), *r)).collect();
        config.alpha_pattern = own.iter().map(|(module, (_, alpha))| (escape(module), *alpha)).collect();
    }
    Ok(config)
}

/// `target_modules` of a file: `all-linear` spelled out, since not every reader knows the word, and long lists shortened.
fn targets_to_write(
    layout: &Layout,
    config: &LoraConfig,
    adapted: &BTreeSet<&str>,
) -> Result<Option<TargetModules>, PeftError> {
    let parameters = parameters(layout, &config.key_mapping)?;
    let names: BTreeSet<String> = match &config.target_modules {
        Some(TargetModules::AllLinear) => {
            // The file keeps its exclusions, so what they leave out may be meant by a short end.
            let all = LoraConfig { exclude_modules: None, modules_to_save: vec![], ..config.clone() };
            Plan::modules(&parameters, &all)?
        }
        Some(TargetModules::Names(names)) if names.len() >= MANY_TARGETS => names.clone(),
        other => return Ok(other.clone()),
    };
    let is_target = |module: &str| names.iter().any(|name| matches_name(module, name));
    let others = module_names(&parameters).into_iter().filter(|module| !is_target(module));
    let short = condensed(&names, others);
    // A name in full is matched whatever `layers_to_transform` says, and its end is not. So it is tried out.
    for candidate in [short, names] {
        let targets = TargetModules::Names(candidate);
        let mut written = config.clone();
        written.target_modules = Some(targets.clone());
        let meant = Plan::modules(&parameters, &written);
        if meant.is_ok_and(|meant| meant.iter().map(String::as_str).eq(adapted.iter().copied())) {
            return Ok(Some(targets));
        }
    }
    Ok(Some(adapted.iter().copied().collect()))
}
