//! What the layers that work on activations have in common.

/// Makes a tuple struct around one of Burn's layers a module in its place: the same parameters under the same paths,
/// conversions in both directions, `Deref`, and the plain layer's display with the names of the adapters. The attributes
/// are those of the conversion to the plain layer.
macro_rules! transparent_layer {
    ($layer:ident, $plain:ident, $(#[$into_plain:meta])*) => {
        impl From<$plain> for $layer {
            fn from(layer: $plain) -> Self {
                Self(layer)
            }
        }

        $(#[$into_plain])*
        impl From<$layer> for $plain {
            fn from(layer: $layer) -> Self {
                layer.0
            }
        }

        impl std::ops::Deref for $layer {
            type Target = $plain;

            fn deref(&self) -> &$plain {
                &self.0
            }
        }

        impl burn::module::Module for $layer {
            fn collect_devices(&self, devices: burn::module::Devices) -> burn::module::Devices {
                self.0.collect_devices(devices)
            }

            fn fork(self, device: &burn::tensor::Device) -> Self {
                Self(self.0.fork(device))
            }

            fn to_device(self, device: &burn::tensor::Device) -> Self {
                Self(self.0.to_device(device))
            }

            fn train(self) -> Self {
                Self(self.0.train())
            }

            fn valid(&self) -> Self {
                Self(self.0.valid())
            }

            fn materialize(self) -> Self {
                Self(self.0.materialize())
            }

            /// Announces the wrapper, which adds nothing to the path, and visits the inner layer.
            fn visit<V: burn::module::ModuleVisitor>(&self, visitor: &mut V) {
                $crate::seam::announce(visitor);
                self.0.visit(visitor);
            }

            fn map<M: burn::module::ModuleMapper>(self, mapper: &mut M) -> Self {
                Self(self.0.map(mapper))
            }
        }

        impl burn::module::ModuleDisplay for $layer {
            fn custom_settings(&self) -> Option<burn::module::DisplaySettings> {
                self.0.custom_settings()
            }

            fn custom_content(&self, content: burn::module::Content) -> Option<burn::module::Content> {
                let content = self.0.custom_content(content)?;
                Some(match self.0.weight.reparameterization::<$crate::adapter::Adapters>() {
                    Some(adapters) => content.add("adapters", &adapters.describe()),
                    None => content,
                })
            }
        }

        impl burn::module::ModuleDisplayDefault for $layer {
            fn content(&self, content: burn::module::Content) -> Option<burn::module::Content> {
                burn::module::ModuleDisplayDefault::content(&self.0, content)
            }
        }
    };
}

pub(super) use transparent_layer;
