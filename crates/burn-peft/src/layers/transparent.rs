//! What the layers that work on activations have in common.

/// Makes a struct around one of Burn's layers, in its field `layer`, a module in its place: the same parameters under the
/// same paths, conversions in both directions, `Deref`, and the plain layer's display with the names of the adapters. The
/// struct has a function `new` that wraps a plain layer, and a method `announce` for what visitors should know. The
/// attributes are those of the conversion to the plain layer.
macro_rules! transparent_layer {
    ($layer:ident, $plain:ident, $(#[$into_plain:meta])*) => {
        impl From<$plain> for $layer {
            fn from(layer: $plain) -> Self {
                Self::new(layer)
            }
        }

        $(#[$into_plain])*
        impl From<$layer> for $plain {
            fn from(layer: $layer) -> Self {
                layer.layer
            }
        }

        impl std::ops::Deref for $layer {
            type Target = $plain;

            fn deref(&self) -> &$plain {
                &self.layer
            }
        }

        impl burn::module::Module for $layer {
            fn collect_devices(&self, devices: burn::module::Devices) -> burn::module::Devices {
                self.layer.collect_devices(devices)
            }

            fn fork(mut self, device: &burn::tensor::Device) -> Self {
                self.layer = self.layer.fork(device);
                self
            }

            fn to_device(mut self, device: &burn::tensor::Device) -> Self {
                self.layer = self.layer.to_device(device);
                self
            }

            fn train(mut self) -> Self {
                self.layer = self.layer.train();
                self
            }

            fn valid(&self) -> Self {
                let mut valid = self.clone();
                valid.layer = self.layer.valid();
                valid
            }

            fn materialize(mut self) -> Self {
                self.layer = self.layer.materialize();
                self
            }

            /// Announces the wrapper, which adds nothing to the path, and visits the inner layer.
            fn visit<V: burn::module::ModuleVisitor>(&self, visitor: &mut V) {
                self.announce(visitor);
                self.layer.visit(visitor);
            }

            fn map<M: burn::module::ModuleMapper>(mut self, mapper: &mut M) -> Self {
                self.layer = self.layer.map(mapper);
                self
            }
        }

        impl burn::module::ModuleDisplay for $layer {
            fn custom_settings(&self) -> Option<burn::module::DisplaySettings> {
                self.layer.custom_settings()
            }

            fn custom_content(&self, content: burn::module::Content) -> Option<burn::module::Content> {
                let content = self.layer.custom_content(content)?;
                Some(match $crate::adapter::Adapters::of(&self.layer.weight) {
                    Some(adapters) => content.add("adapters", &adapters.describe()),
                    None => content,
                })
            }
        }

        impl burn::module::ModuleDisplayDefault for $layer {
            fn content(&self, content: burn::module::Content) -> Option<burn::module::Content> {
                burn::module::ModuleDisplayDefault::content(&self.layer, content)
            }
        }
    };
}

pub(super) use transparent_layer;
