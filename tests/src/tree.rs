//! A module of any shape.

use burn::module::{Devices, Module, ModuleDisplay, ModuleDisplayDefault, ModuleMapper, ModuleVisitor};
use burn::nn::{Embedding, EmbeddingConfig, LinearConfig};
use burn::tensor::Device;
use burn_peft::LoraLinear;

/// A module with leaves at any paths: linear layers, and embeddings where the path says so.
#[derive(Clone, Debug)]
pub struct Tree {
    linears: Vec<(String, LoraLinear)>,
    embeddings: Vec<(String, Embedding)>,
}

impl Tree {
    /// Linear layers of 3 in 2 dimensions, embeddings of 5 in 3 dimensions.
    pub fn new(keys: &[String], device: &Device) -> Self {
        let (embeddings, linears): (Vec<_>, Vec<_>) =
            keys.iter().cloned().partition(|key| key.ends_with("embed_tokens"));
        let linear = |key| (key, LinearConfig::new(3, 2).init(device).into());
        let embedding = |key| (key, EmbeddingConfig::new(5, 3).init(device));
        Self {
            linears: linears.into_iter().map(linear).collect(),
            embeddings: embeddings.into_iter().map(embedding).collect(),
        }
    }

    fn each(
        self,
        linear: impl FnMut(LoraLinear) -> LoraLinear,
        embedding: impl FnMut(Embedding) -> Embedding,
    ) -> Self {
        fn each<T>(list: Vec<(String, T)>, mut change: impl FnMut(T) -> T) -> Vec<(String, T)> {
            list.into_iter().map(|(key, module)| (key, change(module))).collect()
        }
        Self { linears: each(self.linears, linear), embeddings: each(self.embeddings, embedding) }
    }
}

const CONTAINER: &str = "Struct:Tree";

impl Module for Tree {
    fn collect_devices(&self, devices: Devices) -> Devices {
        let devices =
            self.linears.iter().fold(devices, |devices, (_, module)| module.collect_devices(devices));
        self.embeddings.iter().fold(devices, |devices, (_, module)| module.collect_devices(devices))
    }

    fn fork(self, device: &Device) -> Self {
        self.each(|module| module.fork(device), |module| module.fork(device))
    }

    fn to_device(self, device: &Device) -> Self {
        self.each(|module| module.to_device(device), |module| module.to_device(device))
    }

    fn train(self) -> Self {
        self.each(Module::train, Module::train)
    }

    fn valid(&self) -> Self {
        self.clone().each(|module| module.valid(), |module| module.valid())
    }

    fn materialize(self) -> Self {
        self.each(Module::materialize, Module::materialize)
    }

    fn visit<V: ModuleVisitor>(&self, visitor: &mut V) {
        fn within<V: ModuleVisitor>(visitor: &mut V, key: &str, module: &impl Module) {
            key.split('.').for_each(|segment| visitor.enter_module(segment, CONTAINER));
            module.visit(visitor);
            key.rsplit('.').for_each(|segment| visitor.exit_module(segment, CONTAINER));
        }
        self.linears.iter().for_each(|(key, module)| within(visitor, key, module));
        self.embeddings.iter().for_each(|(key, module)| within(visitor, key, module));
    }

    fn map<M: ModuleMapper>(self, mapper: &mut M) -> Self {
        fn within<M: ModuleMapper, T: Module>(mapper: &mut M, (key, module): (String, T)) -> (String, T) {
            key.split('.').for_each(|segment| mapper.enter_module(segment, CONTAINER));
            let module = module.map(mapper);
            key.rsplit('.').for_each(|segment| mapper.exit_module(segment, CONTAINER));
            (key, module)
        }
        Self {
            linears: self.linears.into_iter().map(|leaf| within(mapper, leaf)).collect(),
            embeddings: self.embeddings.into_iter().map(|leaf| within(mapper, leaf)).collect(),
        }
    }
}

impl ModuleDisplay for Tree {}

impl ModuleDisplayDefault for Tree {
    fn content(&self, content: burn::module::Content) -> Option<burn::module::Content> {
        Some(content)
    }
}
