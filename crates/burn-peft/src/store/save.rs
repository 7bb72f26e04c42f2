//! Writing adapters.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use burn::module::Module;
use burn_peft_files::DirectoryWriter;

use super::condense::{MANY_TARGETS, condensed};
use super::{CONFIG_FILE, TENSOR_FILE, adapter_config, keys, tensors};
use crate::adapter::Adapter;
use crate::config::PeftConfig;
use crate::error::PeftError;
use crate::plan::{Choice, module_names, parameters};
use crate::seam::Layout;
use crate::target::{TargetModules, matches_name};

/// Writes adapter `name` of the model to `directory`.
pub(crate) fn save(layout: &Layout, name: &str, directory: &Path) -> Result<(), PeftError> {
    let adapters: Vec<&Adapter> = layout.states.of(name).map(|(_, adapter)| adapter).collect();
    let Some(first) = adapters.first() else {
        return Err(PeftError::UnknownAdapter { name: name.to_string(), available: vec![] });
    };
    let mut config = config_to_write(layout, &first.info.config, &adapters)?;
    config.kind_mut().make_plain(first.info.scale);
    let mut tensors = vec![];
    for adapter in adapters {
        let site = &adapter.info.site;
        for update in adapter.valid().updates {
            let update = update.method.plain(&update, site).unwrap_or(update);
            for (spec, tensor) in update.parts().filter(|(spec, _)| spec.is_trained) {
                let key = keys::join(&site.name, &spec.key);
                tensors.push((key, spec.shape.clone(), spec.to_file(tensor.val())));
            }
        }
    }
    let (config_path, path) = (directory.join(CONFIG_FILE), directory.join(TENSOR_FILE));
    let config = adapter_config::to_json(&config, &config_path)?;
    let tensors = tensors::to_bytes(&path, &tensors)?;

    let writer = DirectoryWriter::open(directory).map_err(PeftError::io(directory))?;
    let staged = writer.stage_bytes(TENSOR_FILE, &tensors).map_err(PeftError::io(&path))?;
    let staged_config = writer.stage_bytes(CONFIG_FILE, &config).map_err(PeftError::io(&config_path))?;
    // Tensors beside another adapter's configuration would load and mean something else. So an old configuration that
    // differs goes first and the new one comes last: whenever the process ends, and for readers who do not wait, the
    // directory holds no mixture.
    if std::fs::read(&config_path).is_ok_and(|old| old != config) {
        writer.remove(CONFIG_FILE).map_err(PeftError::io(&config_path))?;
    }
    staged.put().map_err(PeftError::io(&path))?;
    staged_config.put().map_err(PeftError::io(&config_path))
}

/// The configuration as a file has to say it, so that reading it gives these adapters.
fn config_to_write(
    layout: &Layout,
    config: &PeftConfig,
    adapters: &[&Adapter],
) -> Result<PeftConfig, PeftError> {
    let mut config = config.clone();
    let modules: BTreeSet<&str> = adapters
        .iter()
        .filter(|adapter| adapter.info.is_target)
        .map(|adapter| &*adapter.info.site.name)
        .collect();
    config.targeting_mut().target_modules = targets_to_write(layout, &config, &modules)?;
    // A file has its patterns in alphabetical order, and the first that matches counts. Where that changes a module's
    // rank or alpha, each module gets a pattern of its own.
    let (ranks, sorted) = (config.kind().ranks()?, config.kind().ranks()?.sorted());
    let mut own: BTreeMap<&str, (usize, f64)> = BTreeMap::new();
    let mut order_matters = false;
    for &module in &modules {
        let values = ranks.of(module)?;
        order_matters |= sorted.of(module)? != values;
        own.insert(module, values);
    }
    if order_matters {
        let escape = |module: &str| format!("^{}", fancy_regex::escape(module));
        let ranks = own.iter().map(|(module, (r, _))| (escape(module), *r)).collect();
        let alphas = own.iter().map(|(module, (_, alpha))| (escape(module), *alpha)).collect();
        config.kind_mut().set_ranks(ranks, alphas);
    }
    Ok(config)
}

/// `target_modules` of a file: `all-linear` spelled out, since not every reader knows the word, and long lists shortened.
fn targets_to_write(
    layout: &Layout,
    config: &PeftConfig,
    adapted: &BTreeSet<&str>,
) -> Result<Option<TargetModules>, PeftError> {
    let parameters = parameters(layout, &config.targeting().key_mapping)?;
    let names: BTreeSet<String> = match &config.targeting().target_modules {
        Some(TargetModules::AllLinear) => {
            // The file keeps its exclusions, so what they leave out may be meant by a short end.
            let mut all = config.clone();
            all.targeting_mut().exclude_modules = None;
            all.targeting_mut().modules_to_save = vec![];
            Choice::of(&parameters, &all)?.adapted
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
        written.targeting_mut().target_modules = Some(targets.clone());
        let meant = Choice::of(&parameters, &written);
        if meant.is_ok_and(|meant| meant.adapted.iter().map(String::as_str).eq(adapted.iter().copied())) {
            return Ok(Some(targets));
        }
    }
    Ok(Some(adapted.iter().copied().collect()))
}
